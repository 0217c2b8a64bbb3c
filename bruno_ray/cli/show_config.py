"""What `bruno-ray show-config` prints: every effective value, where it came from, what it means."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bruno_ray.settings.keys import FIELDS
from bruno_ray.settings.passwords import without_password
from bruno_ray.settings.sources import DEFAULT, Loaded, values


def documentation(key: str) -> str:
    """The docstring of a setting, as one line."""
    return " ".join((FIELDS[key].description or "").split())


def toml_value(value: Any) -> str:
    """A TOML literal. None is the word that settings read as None."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_value(str(k))} = {toml_value(v)}" for k, v in value.items()) + " }"
    # JSON escapes are TOML escapes, except that TOML also wants DEL escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def as_text(loaded: Loaded, describe: bool) -> Iterator[str]:
    """Plain lines `key = value  (origin)`, for pipes."""
    for key, value in shown_values(loaded):
        if describe:
            yield f"# {documentation(key)}"
        yield f"{key} = {_shown(value)}  ({loaded.origins[key]})"


def as_table(loaded: Loaded, describe: bool) -> Any:
    """The same as a rich table, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("setting", "value", "from", box=None, header_style="bold", pad_edge=False)
    if describe:
        table.add_column("meaning")
    section = None
    for key, value in shown_values(loaded):
        if section not in (None, key.split(".")[0]):
            table.add_section()
        section = key.split(".")[0]
        origin = loaded.origins[key]
        style = "dim" if origin == DEFAULT else "green"
        cells = [escape(key), escape(_shown(value)), f"[{style}]{escape(origin)}[/]"]
        table.add_row(*cells, *([escape(documentation(key))] if describe else []))
    return table


def as_toml(loaded: Loaded, describe: bool) -> Iterator[str]:
    """A config file that gives exactly these settings.

    What nobody has set appears as a comment; what somebody has emptied, as the word `none`, since the preset may say
    something else. The password of a storage is not written: it stays in the environment.
    """
    # Keys outside every table come first, or they would belong to the table before them; a table is begun once.
    tables: dict[str, list[tuple[str, Any]]] = {"": []}
    for key, value in shown_values(loaded):
        tables.setdefault(key.rpartition(".")[0], []).append((key, value))
    for table, members in tables.items():
        if table:
            yield ""
            yield f"[{table}]"
        for key, value in members:
            if describe:
                yield f"# {documentation(key)}  [{loaded.origins[key]}]"
            commented = value is None and loaded.origins[key] == DEFAULT
            yield ("# " if commented else "") + f"{key.rpartition('.')[2]} = {toml_value(value)}"


def shown_values(loaded: Loaded) -> Iterator[tuple[str, Any]]:
    """Every effective (dotted key, value), without the password of a storage."""
    for key, value in values(loaded.settings):
        yield key, without_password(value) if key == "study.storage" and value is not None else value


def _shown(value: Any) -> str:
    return toml_value(str(value) if isinstance(value, Path) else value) if value is not None else "(not set)"
