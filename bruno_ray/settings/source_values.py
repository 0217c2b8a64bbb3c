"""What one source says about settings: values by dotted key, each with where it came from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bruno_ray.errors import SettingsError
from bruno_ray.settings.keys import FIELDS, SECTIONS, is_optional, nearest


class Provenance(NamedTuple):
    """One value somebody gave."""

    value: Any
    origin: str
    """For `show-config`: command line, environment BRUNO_STUDY__SEED, config.toml, preset refusal."""
    label: str
    """For errors, as the user wrote it: --study.seed, BRUNO_STUDY__SEED, config.toml: study.seed."""


SourceValues = dict[str, Provenance]
"""Dotted key -> what was said about it, by one source or by several merged."""


def flatten(tree: Mapping[str, Any], origin: str) -> SourceValues:
    """A nested dict as flat values. Unknown keys, and values where a group belongs, are errors at every depth."""
    said: SourceValues = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key in SECTIONS:
                if not isinstance(value, Mapping):
                    raise SettingsError(f"{origin}: {key} is a group of settings, not a value; write [{key}]")
                walk(value, key + ".")
            elif key in FIELDS:
                if is_optional(FIELDS[key]) and value == "none":
                    value = None
                said[key] = Provenance(value, origin, f"{origin}: {key}")
            else:
                raise SettingsError(f"{origin}: unknown setting {key!r}{did_you_mean(nearest(key))}")

    walk(tree, "")
    return said


def did_you_mean(name: str | None) -> str:
    return f"; did you mean {name!r}?" if name else "; `bruno-ray show-config --describe` lists all settings"


def nest(said: SourceValues) -> dict[str, Any]:
    """The values alone, as a nested dict."""
    tree: dict[str, Any] = {}
    for key, given in said.items():
        node = tree
        *groups, leaf = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = given.value
    return tree
