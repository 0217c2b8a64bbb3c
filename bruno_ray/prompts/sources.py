"""Rows of one prompt data set, wherever it lies: a hub data set, a folder, a file, or what this package ships.

`read_rows(settings, limit)` dispatches on `settings.source`:

    organism:target, organism:baseline      the embedded organism's prompts (organism-hard:... for that recipe)
    preset:FILE                             a file in bruno_ray/presets/data
    *.jsonl *.csv *.parquet *.txt           a file; .txt holds one prompt per line
    folder written by save_to_disk          Dataset or DatasetDict
    any other folder, hub data set id       `datasets.load_dataset`

Only this module imports datasets and pyarrow, where they are needed. Every trouble is a PromptError.
"""

import csv
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from bruno_ray.errors import PromptError, first_line
from bruno_ray.settings import DatasetSettings

logger = logging.getLogger(__name__)

PRESET_DATA = Path(__file__).parent.parent / "presets" / "data"
FILE_SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")
USUAL_COLUMNS = ("prompt", "text", "instruction", "question")


class Row(NamedTuple):
    text: str
    answer: str | None = None
    words: str | None = None
    category: str | None = None


BESIDE = ("answer", "words", "category")
"""What a row may have beside its text, in the column that `<name>_column` of the settings names."""


@dataclass(frozen=True)
class Slice:
    """`name[start:stop]`: a split and which of its rows. Bounds are row numbers or percentages; - is from the end."""

    split: str
    start: str = ""
    stop: str = ""

    @property
    def is_head(self) -> bool:
        """True for `name[:n]` and `name[a:b]`, whose rows can be streamed without knowing how many there are."""
        return self.stop.isdigit() and (not self.start or self.start.isdigit())

    def of(self, n: int) -> slice:
        """Absolute bounds in a split of `n` rows."""
        return slice(self._bound(self.start, 0, n), self._bound(self.stop, n, n))

    @staticmethod
    def _bound(text: str, default: int, n: int) -> int:
        if not text:
            return default
        bound = round(n * float(text[:-1]) / 100) if text.endswith("%") else int(text)
        return max(0, min(n, bound + n if text.startswith("-") else bound))


_SLICE = re.compile(r"\s*([\w.\-]*)\s*(?:\[\s*(-?\d+(?:\.\d+)?%?)?\s*:\s*(-?\d+(?:\.\d+)?%?)?\s*\])?\s*")


def parse_split(text: str) -> list[Slice]:
    """`train[:400]`, `[10%:]`, `train+test` as slices; an omitted name is `train`."""
    parts = []
    for item in text.split("+"):
        match = _SLICE.fullmatch(item)
        bounds = [bound for bound in (match.groups()[1:] if match else ()) if bound]
        if match is None or any("." in bound and not bound.endswith("%") for bound in bounds):
            raise PromptError(
                f"split {text!r} is not understood; write a split name, a slice such as train[:400], test[100:200] or"
                " [10%:], or several joined by +"
            )
        parts.append(Slice(match[1] or "train", match[2] or "", match[3] or ""))
    return parts


def read_rows(settings: DatasetSettings, limit: int) -> list[Row]:
    """The rows of one data set in order; `limit` bounds a stream whose split has no end of its own.

    Raises PromptError if the source is missing, its split, config or column does not exist, or a row is no text.
    """
    splits = parse_split(settings.split)
    records, columns, place = _open(settings, splits, limit)
    if not columns:
        return []
    column = _pick_column(settings.column, columns, place)
    named = {name: getattr(settings, f"{name}_column") for name in BESIDE}
    beside = {name: _pick_column(given, columns, place) for name, given in named.items() if given}
    rows, blank = [], 0
    for number, record in enumerate(records):
        text = record.get(column)
        if text is None or (isinstance(text, str) and not text.strip()):
            blank += 1
            continue
        if not isinstance(text, str):
            raise PromptError(
                f"{place}: row {number} of column {column!r} holds {type(text).__name__}, not text; name a text column"
                f" (columns: {', '.join(columns)})"
            )
        found = {name: record.get(column) for name, column in beside.items()}
        for name, value in found.items():
            if value is not None and not isinstance(value, str):
                raise PromptError(
                    f"{place}: row {number} of {name} column {beside[name]!r} is not text; name another one"
                )
        rows.append(Row(text, **found))
    if blank:
        logger.info("%s: %d blank rows left out", place, blank)
    return rows


Records = tuple[Iterable[dict[str, Any]], Sequence[str], str]
"""Records as dicts, names of their columns, and the place for messages."""


def _open(settings: DatasetSettings, splits: list[Slice], limit: int) -> Records:
    source = settings.source
    if match := re.fullmatch(r"organism(?:-(\w+))?:(\w+)", source):
        return _organism(match[1], match[2], splits, source)
    if source.startswith("preset:"):
        path = PRESET_DATA / source.removeprefix("preset:")
        if not path.is_file():
            shipped = ", ".join(sorted(item.name for item in PRESET_DATA.iterdir()))
            raise PromptError(f"{source}: no such file is shipped; there are {shipped}")
        return _file(path, splits, source)
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in FILE_SUFFIXES:
        return _file(path, splits, source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_folder(path, splits, source)
    if not path.is_dir() and not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", source):
        raise PromptError(f"{source!r} is neither a file, a folder nor a hub data set id (owner/name); check the path")
    return _hub(settings, splits, limit)


def _pick_column(column: str | None, columns: Sequence[str], place: str) -> str:
    if column is None:
        candidates = [name for name in USUAL_COLUMNS if name in columns] or (columns if len(columns) == 1 else [])
        if candidates:
            return candidates[0]
    elif column in columns:
        return column
    missing = f"has no column {column!r}" if column else f"has none of the columns {', '.join(USUAL_COLUMNS)}"
    raise PromptError(f"{place} {missing}; set `column` to one of: {', '.join(columns) or '(there are none)'}")


def _cut(records: Sequence[Any], part: Slice) -> Sequence[Any]:
    return records[part.of(len(records))]


# --------------------------------------------------------------------------------------------------------------
# Files


def _organism(recipe: str | None, side: str, splits: list[Slice], place: str) -> Records:
    if side not in ("target", "baseline"):
        raise PromptError(f"{place}: the organism has the sides target and baseline; write organism:target")
    from bruno_ray import organism

    folder = organism.build(recipe=recipe or "standard")
    records: list[dict[str, Any]] = []
    for part in splits:
        path = folder / "prompts" / f"{side}_{part.split}.jsonl"
        if not path.is_file():
            raise PromptError(f"{place}: no split {part.split!r}; there are train, validation and test")
        records += _cut(_read_file(path, str(path)), part)
    return records, _columns(records), place


def _file(path: Path, splits: list[Slice], place: str) -> Records:
    if any(part.split != "train" for part in splits):
        raise PromptError(f"{place}: a file is one split, named train; write train[:400] or only [:400]")
    if not path.is_file():
        raise PromptError(f"{place}: no such file; check the path")
    records = _read_file(path, place)
    cut = [record for part in splits for record in _cut(records, part)]
    return cut, _columns(cut or records), place


def _columns(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _read_file(path: Path, place: str) -> list[dict[str, Any]]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_txt}
    if path.suffix not in readers:
        raise PromptError(f"{place}: a file must be one of {' '.join(readers)}; convert it")
    try:
        return readers[path.suffix](path, place)
    except OSError as error:
        raise PromptError(f"{place}: cannot be read ({error.strerror or error}); check the file") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{place}: not UTF-8 text (byte {error.start}); convert it") from error


def _read_jsonl(path: Path, place: str) -> list[dict[str, Any]]:
    records = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise PromptError(f"{place}: line {number} is not JSON ({error}); mend that line") from None
            if not isinstance(record, dict):
                raise PromptError(f"{place}: line {number} is no JSON object; write " + '{"prompt": "..."} lines')
            records.append(record)
    return records


def _read_csv(path: Path, place: str) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            records = list(reader)
        except csv.Error as error:
            raise PromptError(f"{place}: line {reader.line_num} is not CSV ({error}); mend that line") from None
    for number, record in enumerate(records, start=1):
        if None in record:
            raise PromptError(f"{place}: row {number} has more fields than the header; quote texts that hold commas")
    return records


def _read_txt(path: Path, place: str) -> list[dict[str, Any]]:
    return [{"text": line} for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _read_parquet(path: Path, place: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise PromptError(f"{place}: not a parquet file ({first_line(error)}); check the file") from None


def _saved_folder(path: Path, splits: list[Slice], place: str) -> Records:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise PromptError(f"{place}: cannot be loaded from disk ({first_line(error)}); save it again") from error
    by_name = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved, "train": saved}
    return _cut_splits(by_name, splits, place)


def _cut_splits(by_name: dict[str, Any], splits: list[Slice], place: str) -> Records:
    """Slices of named `datasets.Dataset`s, chained."""
    columns = None
    cut = []
    for part in splits:
        if part.split not in by_name:
            raise PromptError(f"{place}: no split {part.split!r}; there are {', '.join(by_name)}")
        dataset = by_name[part.split]
        columns = columns or list(dataset.column_names)
        bounds = part.of(len(dataset))
        cut.append(dataset.select(range(bounds.start, max(bounds.start, bounds.stop))))
    return (record for dataset in cut for record in dataset), columns or [], place


# --------------------------------------------------------------------------------------------------------------
# The hub


def _hub(settings: DatasetSettings, splits: list[Slice], limit: int) -> Records:
    import datasets

    streaming = all(part.is_head for part in splits) if settings.streaming is None else settings.streaming
    place = settings.source + (f" ({settings.config})" if settings.config else "")
    try:
        by_name = {
            name: datasets.load_dataset(
                settings.source, settings.config, split=name, revision=settings.revision, streaming=streaming
            )
            for name in dict.fromkeys(part.split for part in splits)
        }
        return _stream(by_name, splits, limit, place) if streaming else _cut_splits(by_name, splits, place)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise _hub_error(settings, splits, place, error) from error


def _stream(by_name: dict[str, Any], splits: list[Slice], limit: int, place: str) -> Records:
    """Rows of iterable data sets, read here so that a failing download is reported as one of this data set."""
    records: list[dict[str, Any]] = []
    for part in splits:
        if (part.start or part.stop) and not part.is_head and not (part.start.isdigit() and not part.stop):
            raise PromptError(
                f"{place}: a stream has no known length, so [{part.start}:{part.stop}] cannot be taken from it;"
                " write [a:b] or set streaming = false"
            )
        start = int(part.start or 0)
        stop = int(part.stop) if part.stop else start + limit
        records += islice(_iterate(by_name[part.split]), start, stop)
    return records, _columns(records), place


def _iterate(dataset: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from dataset


def _hub_error(settings: DatasetSettings, splits: list[Slice], place: str, error: Exception) -> PromptError:
    """Says which config or split exists if that is what went wrong, else the first line of the error."""
    import datasets

    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return PromptError(
            f"{place}: not found on the hub, or gated; check the id, and log in with `hf auth login` if it needs access"
        )
    if isinstance(error, ConnectionError):
        return PromptError(
            f"{place}: the hub cannot be reached and nothing is cached; check the network, or give a file"
        )
    try:
        configs = datasets.get_dataset_config_names(settings.source, revision=settings.revision)
        if settings.config not in configs and (settings.config is not None or len(configs) > 1):
            problem = f"has no config {settings.config!r}" if settings.config else "needs a config"
            return PromptError(f"{settings.source} {problem}; set `config` to one of: {', '.join(configs)}")
        names = datasets.get_dataset_split_names(settings.source, settings.config, revision=settings.revision)
        for part in splits:
            if part.split not in names:
                return PromptError(f"{place}: no split {part.split!r}; there are {', '.join(names)}")
    except (ValueError, OSError, datasets.exceptions.DatasetsError):
        logger.debug("%s: configs and splits cannot be listed", place, exc_info=True)
    return PromptError(f"{place}: cannot be loaded ({first_line(error)}); check id, config, split and network")
