"""What models return."""

from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass
class ModelOutput:
    """Fields by name, and by index as in transformers: an index counts the fields that are not None. `padding` is what
    results for tokens hold where there is none.
    """

    padding: ClassVar[float] = 0.0
    attentions: ClassVar[None] = None  # of which transformers' outputs may have some

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        """The names of the fields that are not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def values(self) -> tuple:
        return self.to_tuple()

    def items(self) -> list[tuple]:
        return list(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, name: str, default=None):
        return self[name] if name in self else default

    def __contains__(self, name: str) -> bool:
        return name in self.keys()

    def __getitem__(self, key: int | slice | str):
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{key!r}; this {type(self).__name__} has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self):
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())
