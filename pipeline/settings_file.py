"""Settings in YAML and `--set key.subkey=value`: read strictly, and laid over each other. Knows no keys.

Called by `pipeline.job` for job files, and by the endpoint for its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class JobError(ValueError):
    """The settings as written cannot be run; the message names the key, its value, what is allowed and the way out."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is a mistake, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} stands twice; remove one")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """A file of settings; JobError if it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise JobError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read: {error}") from error
    data = _parse_yaml(text, path)
    if not isinstance(data, dict):
        raise JobError(f"{path}: holds a {type(data).__name__}; settings are a mapping with keys such as model")
    return data


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, TypeError) as error:
        raise JobError(f"{source}: not valid YAML: {error}") from error


def parse_override(override: str) -> dict[str, Any]:
    """`key.subkey=value`, the value in YAML, as a nested mapping."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise JobError(f"--set {override}: write key.subkey=value, as in --set sampling.max_tokens=64")
    value = _parse_yaml(text, f"--set {override}")
    for part in reversed(parts):
        value = {part: value}
    return value


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = merge_settings(old, value)
        else:
            merged[key] = value
    return merged
