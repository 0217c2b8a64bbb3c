"""Rows of one prompt data set, wherever it lies: a hub data set, a folder, a file, or what this package ships.

`read(settings, limit)` dispatches on `settings.source`:

    organism:target, organism:baseline      the embedded organism's prompts (organism-hard:... for that recipe)
    preset:FILE                             a file in bruno_ray/presets/data
    *.jsonl *.csv *.txt ...                 a file (formats/)
    hf://datasets/OWNER/NAME/FILE           a file of a hub data set (hub.py)
    folder written by save_to_disk          Dataset or DatasetDict
    any other folder, hub data set id       `datasets.load_dataset`

Every trouble is a PromptError.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bruno_ray.errors import PromptError
from bruno_ray.files import expanded
from bruno_ray.prompts.conversations import CHAT_COLUMNS, asked, conversation_of
from bruno_ray.prompts.formats import FORMATS, format_of, read_file
from bruno_ray.prompts.formats.json_text import whole_characters
from bruno_ray.prompts.formats.table import Given, Record, columns_of, excerpt
from bruno_ray.prompts.hub import ID, download, hub_file, hub_rows, saved_folder, settled
from bruno_ray.prompts.slicing import Slice, cut, parse_split
from bruno_ray.settings import DatasetSettings

PRESET_DATA = Path(__file__).parent.parent / "presets" / "data"
USUAL_COLUMNS = ("prompt", "text", "instruction", "question")


class Row(NamedTuple):
    text: str
    answer: str | None = None
    words: str | None = None
    category: str | None = None
    system: str | None = None
    """The system turn, where the prompt is a conversation's."""


NOTHING_ASKED = "conversations without a user turn left out"

BESIDE = ("answer", "words", "category")
"""What a row may have beside its text, in the column that `<name>_column` of the settings names."""


class Reading(NamedTuple):
    rows: list[Row]
    notes: tuple[str, ...]
    """What a reader has to know to trust the rows: what was inferred, and what was left out."""


@dataclass(frozen=True)
class Opened:
    records: Iterable[Record]
    columns: Sequence[str]
    place: str
    """The source, for messages."""

    notes: tuple[str, ...] = ()


def read_rows(settings: DatasetSettings, limit: int) -> list[Row]:
    """The rows of `read`."""
    return read(settings, limit).rows


def read(settings: DatasetSettings, limit: int) -> Reading:
    """The rows of one data set in order; `limit` bounds a stream whose split has no end of its own.

    Raises PromptError if the source is missing, its split, config or column does not exist, or a row is no text.
    """
    opened = _open(settings, parse_split(settings.split), limit)
    if not opened.columns:
        return Reading([], opened.notes)
    column = _pick_column(settings.column, opened)
    beside = {name: _pick_column(given, opened) for name in BESIDE if (given := getattr(settings, f"{name}_column"))}
    rows: list[Row] = []
    seen: Counter[str] = Counter()
    for record in opened.records:
        row = _row(record, column, opened.columns, seen)
        if row is None:
            continue
        found: dict[str, Any] = {name: record.fields.get(column) for name, column in beside.items()}
        for name, value in found.items():
            if value is not None and not isinstance(value, str):
                raise PromptError(f"{record.where}: {name} column {beside[name]!r} is not text; name another one")
        rows.append(row._replace(**found))
    if seen[NOTHING_ASKED] and not rows:
        raise PromptError(f"{opened.place}: no conversation in {column!r} has a user turn; check its roles")
    of_column = (f"column {column!r}",) if len(opened.columns) > 1 and settings.column is None else ()
    return Reading(rows, (*opened.notes, *of_column, *(f"{n} {what}" for what, n in seen.items() if n)))


def _row(record: Record, column: str, columns: Sequence[str], seen: Counter[str]) -> Row | None:
    """The prompt of a record; None for one without. `seen` counts what is said of the rows."""
    value = record.fields.get(column)
    if column not in record.fields:
        seen[f"rows without {column!r} left out"] += 1
        return None
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        seen["blank rows left out"] += 1
        return None
    if (turns := conversation_of(value)) is None:
        if not isinstance(value, str):
            raise PromptError(
                f"{record.where}: column {column!r} holds {type(value).__name__}, not text: {excerpt(str(value))}; name"
                f" a text column (columns: {', '.join(columns)})"
            )
        if column in CHAT_COLUMNS and value.lstrip().startswith("["):
            raise PromptError(
                f"{record.where}: column {column!r} holds a conversation that is not JSON: {excerpt(value)}; write it"
                ' as [{"role": "user", "content": "..."}]'
            )
        return Row(value)
    try:
        question = asked(turns)
    except ValueError as error:
        raise PromptError(f"{record.where}: a turn of {column!r} is not text ({error}); leave the row out") from None
    if question is None:
        seen[NOTHING_ASKED] += 1
        return None
    seen["conversations, of which the last user turn is asked"] += 1
    seen["conversations whose earlier turns are left out"] += question.is_cut
    user, system = whole_characters([question.user, question.system])  # JSON text in a CSV file has not been looked at
    seen["prompts with half a surrogate pair replaced by U+FFFD"] += [user, system] != [question.user, question.system]
    return Row(user, system=system)


def _open(settings: DatasetSettings, splits: list[Slice], limit: int) -> Opened:
    source = settings.source
    if match := re.fullmatch(r"organism(?:-(\w+))?:(\w+)", source):
        return _organism(match[1], match[2], splits, source)
    if source.startswith("preset:"):
        path = PRESET_DATA / source.removeprefix("preset:")
        if not path.is_file():
            shipped = ", ".join(sorted(item.name for item in PRESET_DATA.iterdir()))
            raise PromptError(f"{source}: no such file is shipped; there are {shipped}")
        return _files([path], settings, splits)
    path = expanded(source)
    if path.is_file():
        return _files([path], settings, splits)
    if wanted := hub_file(settings):
        if format_of(wanted.file) is None:
            raise PromptError(f"{source}: a file must be one of {' '.join(FORMATS)}, or that and .gz")
        return _files(download(wanted), settings, splits)
    for name in ("encoding", "separator"):
        if getattr(settings, name) is not None:
            raise PromptError(f"{source}: `{name}` is for files; name one as the source, or leave it out")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _of_library(saved_folder(path, splits, source), source)
    if not path.is_dir():
        if format_of(source) is not None:
            raise PromptError(f"{source}: no such file; check the path")
        settings = settled(settings)
        if not ID.fullmatch(settings.source):
            raise PromptError(
                f"{source!r} is neither a file, a folder nor a hub data set id (owner/name or owner/name/config);"
                " check the path"
            )
    return _of_library(hub_rows(settings, splits, limit), source)


def _organism(recipe: str | None, side: str, splits: list[Slice], place: str) -> Opened:
    if side not in ("target", "baseline"):
        raise PromptError(f"{place}: the organism has the sides target and baseline; write organism:target")
    from bruno_ray import organism

    folder = organism.build(recipe=recipe or "standard")
    records: list[Record] = []
    for part in splits:
        path = folder / "prompts" / f"{side}_{part.split}.jsonl"
        if not path.is_file():
            raise PromptError(f"{place}: no split {part.split!r}; there are train, validation and test")
        records += cut(read_file(path, Given(str(path))).records, part)
    return Opened(records, columns_of(records), place)


def _files(paths: list[Path], settings: DatasetSettings, splits: list[Slice]) -> Opened:
    """One file, or the files of one data set in order."""
    place = settings.source
    if any(part.split != "train" for part in splits):
        raise PromptError(f"{place}: a file is one split, named train; write train[:400] or only [:400]")
    beside = [name for kind in BESIDE if (name := getattr(settings, f"{kind}_column"))]
    wanted = (settings.column,) if settings.column else (*USUAL_COLUMNS, *CHAT_COLUMNS)
    given = Given(place, settings.encoding, settings.separator, (*wanted, *beside))
    named = [given] if len(paths) == 1 else [replace(given, place=f"{place} ({path.name})") for path in paths]
    tables = [read_file(path, one) for path, one in zip(paths, named)]
    records = [record for table in tables for record in table.records]
    chosen = [record for part in splits for record in cut(records, part)]
    notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))
    return Opened(chosen, columns_of(chosen or records), place, notes)


def _of_library(rows: tuple[Iterable[Record], Sequence[str]], place: str) -> Opened:
    """What `datasets` has read, unless it has taken a CSV file for another one.

    It knows commas and headers only: of a file with semicolons it makes one column, named after all of them.
    """
    records, columns = rows
    if len(columns) == 1 and re.search(r"[;\t|,]|\w+ \w+ \w+ \w+|[.?!]$", columns[0]):
        raise PromptError(
            f"{place}: its only column is called {excerpt(columns[0])}, which looks like a CSV file without commas or"
            " without a header; name the file itself as the source"
        )
    return Opened(records, columns, place)


def _pick_column(column: str | None, opened: Opened) -> str:
    columns = opened.columns
    if column is None:
        by_name = {name.strip().casefold(): name for name in reversed(columns)}
        usual = [by_name[name] for name in (*USUAL_COLUMNS, *CHAT_COLUMNS) if name in by_name]
        candidates = usual or (columns if len(columns) == 1 else [])
        if candidates:
            return candidates[0]
    elif column in columns:
        return column
    missing = f"has no column {column!r}" if column else f"has none of the columns {', '.join(USUAL_COLUMNS)}"
    noted = f" ({'; '.join(opened.notes)})" if opened.notes else ""
    raise PromptError(
        f"{opened.place}{noted} {missing}; set `column` to one of: {', '.join(columns) or '(there are none)'}"
    )
