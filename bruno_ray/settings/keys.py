"""Every setting by its dotted key, from the pydantic models: its flag, its variable, how text becomes its value.

Text on the command line and in the environment: lists are `a,b,c` or JSON, dicts `k=v,k=v` or JSON, a whole
section (environment only) is JSON.
"""

import difflib
import json
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bruno_ray.errors import SettingsError
from bruno_ray.settings import Settings

ENV_PREFIX = "BRUNO_"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model class behind an annotation such as `PromptSet` or `DatasetSettings | None`, or None for a leaf. A dict
    of them is a leaf: its keys are the user's."""
    if get_origin(annotation) is dict:
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every (dotted key, field) that holds a value rather than a group, in the order of settings.py."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section:
            yield from leaves(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def sections(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every (dotted key, field) that is a group, the outer before the inner."""
    for name, field in model.model_fields.items():
        if section := section_of(field.annotation):
            yield prefix + name, field
            yield from sections(section, f"{prefix}{name}.")


FIELDS: dict[str, FieldInfo] = dict(leaves())
SECTIONS: dict[str, FieldInfo] = dict(sections())


def _aliases() -> Iterator[tuple[str, str]]:
    for key, field in (SECTIONS | FIELDS).items():
        extra = _known(field)
        if extra.get("alias"):
            yield extra["alias"], f"{key}.{extra['alias_of']}" if extra["alias_of"] else key


def _known(field: FieldInfo) -> dict[str, Any]:
    """What `fields.setting` noted about a field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def is_resumable(key: str) -> bool:
    """Whether a resumed run may change this setting: by its own field, or by a section around it."""
    parts = key.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts))]
    return any(_known((SECTIONS | FIELDS)[name]).get("resumable", False) for name in (*around, key))


ALIASES: dict[str, str] = dict(_aliases())
"""Short flag -> dotted key."""


def flag_of(key: str) -> str:
    return "--" + key.replace("_", "-")


def variable_of(key: str) -> str:
    return ENV_PREFIX + key.upper().replace(".", "__")


FLAGS = {flag_of(key): key for key in FIELDS} | ALIASES


def is_optional(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (Union, types.UnionType) and type(None) in get_args(field.annotation)


def is_switch(field: FieldInfo) -> bool:
    """A flag that may stand without a value."""
    return field.annotation is bool or (is_optional(field) and bool in get_args(field.annotation))


def nearest(key: str) -> str | None:
    """The existing key that somebody who wrote `key` most likely meant."""
    candidates = [*FIELDS, *SECTIONS]
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in candidates if name.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return difflib.get_close_matches(key, same_leaf, 1, 0.0)[0]
    if whole := difflib.get_close_matches(key, candidates, 1, 0.75):
        return whole[0]
    leaves_ = {name.rsplit(".", 1)[-1]: name for name in reversed(candidates)}
    if last := difflib.get_close_matches(leaf, leaves_, 1, 0.75):
        return leaves_[last[0]]
    return None


# --------------------------------------------------------------------------------------------------------------
# Text to values


def parse_text(field: FieldInfo, text: str, label: str) -> Any:
    """Turns text into what pydantic can validate: lists and dicts are taken apart, the rest stays text."""
    kinds = {get_origin(kind) or kind for kind in (field.annotation, *get_args(field.annotation))}
    stripped = text.strip()
    if is_optional(field) and stripped.lower() in ("none", "null"):
        return None
    if str in get_args(field.annotation) and tuple in kinds and get_origin(field.annotation) is not tuple:
        return parse_json(stripped, label) if stripped.startswith('["') else text  # one text, or several as JSON
    if get_origin(field.annotation) is tuple or tuple in kinds or list in kinds:
        if stripped.startswith("["):
            return parse_json(stripped, label)
        return [item.strip() for item in stripped.split(",")] if stripped else []
    if dict in kinds:
        if stripped.startswith("{"):
            return parse_json(stripped, label)
        pairs = [item.partition("=") for item in stripped.split(",") if item.strip()]
        if any(not separator for _, separator, _ in pairs):
            raise SettingsError(f"{label}: {text!r} is not a list of key=value pairs; write a=1,b=2 or JSON")
        return {name.strip(): value.strip() for name, _, value in pairs}
    return text


def parse_json(text: str, label: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{label}: {text!r} is not valid JSON ({error}); quote it for the shell") from None
