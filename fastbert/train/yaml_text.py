"""YAML as settings are written in it."""

from collections import Counter
from os import PathLike

import yaml

from fastbert.errors import ConfigError, shown

_LONGEST = 1 << 16  # characters: PyYAML takes some kilobytes and 20 microseconds for each value
_DEEPEST = 32  # brackets within brackets, at each of which it looks at all that are open


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, without what settings have no use for: one value in several places, which grows without end
    when it is shown, and a key that is there twice."""

    def fetch_flow_collection_start(self, token):
        if self.flow_level >= _DEEPEST:
            raise yaml.YAMLError(f"more than {_DEEPEST} brackets are open{self.get_mark()}")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"the alias *{event.anchor}{event.start_mark}, expected the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        content = super().construct_mapping(node, deep)
        if len(content) < len(node.value):
            keys = Counter(str(key.value) for key, _ in node.value)
            raise yaml.YAMLError(f"the key {shown(keys.most_common(1)[0][0])} is there twice{node.start_mark}")
        return content


def parse_yaml(text: str, where: str | PathLike):
    """What a YAML text says. ConfigError, with `where` it stands."""
    if len(text) > _LONGEST:
        raise ConfigError(f"{where} has {len(text)} characters, expected at most {_LONGEST}")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())  # PyYAML lets through what Python says of a number or a date
        raise ConfigError(f"{where} is not valid YAML: {reason[:300]}") from None
