"""Published pretraining recipes as data: what each of the systems was trained on, for how long and how.

A recipe is a YAML file, shipped in fastbert/recipes or the user's own. Its keys: `title`, `paper`, `sources` (where
the numbers are from), `corpus` (what the published run read), `begins` (the model whose weights it began with),
`unverified` (what was not seen in a source), `choices` (what the publication leaves open and is decided here), `text`
(options of `fastbert prepare`), `settings` (options of `fastbert pretrain` for all phases), `phases` (a name and the
options of each), `demo` (options of the scaled-down run on the demonstration corpus) and `extends` (a recipe whose keys
it takes over: lists and phases are replaced, `text`, `settings` and `demo` are merged).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from fastbert.config import EncoderConfig, nearest
from fastbert.errors import ConfigError, MissingFileError, shown
from fastbert.files import is_plain_name
from fastbert.train.config import Options, PretrainConfig, TextOptions

FOLDER = Path(__file__).parents[1] / "recipes"
_RUN = frozenset("files data out resume overwrite init device threads".split())


@dataclass(frozen=True)
class Recipe:
    """A recipe, see the module."""

    name: str
    title: str
    settings: dict
    phases: list[dict]
    text: dict = field(default_factory=dict)
    demo: dict = field(default_factory=dict)
    paper: str | None = None
    sources: list[str] = field(default_factory=list)
    corpus: str | None = None
    begins: str | None = None
    unverified: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, name: str) -> "Recipe":
        """The shipped recipe of that name, or the one in a YAML file. MissingFileError: there is none; ConfigError: it
        has an unknown key or a value that makes no sense."""
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            path = FOLDER / f"{name}.yaml"
            if name not in recipes():
                known = ", ".join(recipes())
                raise MissingFileError(
                    f"there is no recipe {name!r}{nearest(name, recipes())}, expected the path of a YAML file or one "
                    f"of {known}"
                )
        recipe = cls(name=path.stem, **_read(path))
        for number, phase in enumerate(recipe.phases):  # so that what makes no sense is found at once
            source = f"recipe {path}, phase {phase['name']}"
            settings = recipe.settings | {key: value for key, value in phase.items() if key != "name"}
            for key in _RUN & set(settings):
                raise ConfigError(f"{source}: {key} is {settings[key]!r}, expected it to be no part of a recipe")
            try:
                recipe.phase(number, {})
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None
            _check_words(settings, source)
        TextOptions.from_dict(recipe.text, f"recipe {path}, text")
        for name in ("text", "demo"):
            _check_words(getattr(recipe, name), f"recipe {path}, {name}")
        return recipe

    @property
    def family(self) -> str:
        """The family of its model."""
        if preset := self.settings.get("preset"):
            return EncoderConfig.from_preset(preset).model_type
        return self.settings.get("variant") or "roformer"

    def phase(self, number: int, changes: dict) -> PretrainConfig:
        """The options of a phase, with changes: fields of the architecture are changed one by one, an `init` takes the
        place of the recipe's architecture, `epochs` that of its steps."""
        own = self.settings | {name: value for name, value in self.phases[number].items() if name != "name"}
        PretrainConfig.check(own, f"recipe {self.name}")
        if changes.get("init"):
            own = {name: value for name, value in own.items() if name not in ("preset", "model")}
            own["variant"] = self.family
        if changes.get("epochs") and not changes.get("steps"):
            own.pop("steps", None)
        model = own.get("model", {}) | changes.get("model", {})
        return PretrainConfig.from_dict(own | changes | {"model": model}, f"recipe {self.name}")


def recipes() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The keys of a recipe file, those of what it extends among them."""
    values = Options.read_yaml(path)
    kinds = {entry.name: entry for entry in fields(Recipe) if entry.name != "name"}
    for key, value in values.items():
        if key not in (*kinds, "extends"):
            raise ConfigError(f"recipe {path}: unknown key {shown(key)}{nearest(key, [*kinds, 'extends'])}")
        expected = _KINDS.get(key, list if key in _LISTS else str)
        if not isinstance(value, expected) and not (value is None and key in ("paper", "corpus", "begins")):
            raise ConfigError(f"recipe {path}: {key} is {shown(value)}, expected a {expected.__name__}")
    base = values.pop("extends", None)
    if base is not None:
        if not is_plain_name(f"{base}.yaml"):
            raise ConfigError(f"recipe {path}: extends is {shown(base)}, expected the name of a recipe")
        beside = path.parent / f"{base}.yaml"
        below = beside if beside.is_file() and beside.resolve() != path.resolve() else FOLDER / f"{base}.yaml"
        if below.resolve() in (path.resolve(), *seen):
            raise ConfigError(f"recipe {path}: extends {base!r}, which extends it")
        if not below.is_file():
            raise MissingFileError(f"recipe {path}: extends {base!r}, but {below} does not exist")
        lower = _read(below, (*seen, path.resolve()))
        merged = {key: lower.get(key, {}) | values.get(key, {}) for key in _KINDS}
        values = lower | values | merged
    elif missing := [key for key in ("title", "settings", "phases") if key not in values]:
        raise ConfigError(f"recipe {path}: {missing[0]} is missing")
    _check_phases(path, values.get("phases", []))
    return values


_KINDS = {"text": dict, "settings": dict, "demo": dict}
_LISTS = ("sources", "unverified", "choices", "phases")


def _check_words(options: dict, source: str) -> None:
    """A file that was passed on runs no function that it names."""
    if ":" in str(options.get("words")):
        raise ConfigError(
            f"{source}: words is {shown(options['words'])}, expected no function in a recipe: name it with --words"
        )


def _check_phases(path: Path, phases: list) -> None:
    names = [phase.get("name") if isinstance(phase, dict) else None for phase in phases]
    good = names and all(isinstance(name, str) and Path(name).name == name and name != ".." for name in names)
    if not good or len(set(names)) < len(names):
        raise ConfigError(f"recipe {path}: the names of the phases are {names}, expected a folder name for each")
