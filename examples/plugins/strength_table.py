"""An exporter from outside: the edit's strength at each layer, as a table for a spreadsheet.

bruno-ray export RUN:42 --to examples/plugins/strength_table.py:export FOLDER --option separator=";"
"""

from pathlib import Path

from bruno_ray.errors import OutputError
from bruno_ray.exporting.base import Options, Source
from bruno_ray.files import atomic_directory


def export(source: Source, folder: Path, options: Options) -> str:
    """Write the folder, complete or not at all; returns one line that says what is in it."""
    separator = options.given.get("separator", ",")
    if len(separator) != 1:
        raise OutputError(f"the separator {separator!r} is not one character: give --option separator=;")
    n_layers = len(source.bank[source.edit.direction_set]) - 1
    components = list(source.edit.components)
    rows = [["layer", *components]]
    for layer in range(n_layers):
        rows.append([str(layer), *(f"{source.edit.strength(component, layer):.6g}" for component in components)])
    with atomic_directory(folder) as aside:
        text = "".join(separator.join(row) + "\n" for row in rows)
        (aside / "strengths.csv").write_text(text, encoding="utf-8")
    return f"{folder}: strengths of trial {source.trial} at {n_layers} layers"
