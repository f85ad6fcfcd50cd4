"""Reads YAML in which no map has a key twice."""

from typing import IO, Any

import yaml
from yaml import YAMLError as YAMLError


def load_yaml(file: IO[str]) -> Any:
    """Returns the plain values in a file.

    Raises:
        YAMLError: it is not YAML.
        ValueError: a map has a key twice, of which YAML would take the last.
    """
    return yaml.load(file, _StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a map with a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: {name[:100]!r} is there twice: remove one")
            seen.add(name)
        return super().construct_mapping(node, deep)
