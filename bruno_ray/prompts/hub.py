"""Data sets of the hub, and folders: what `datasets` loads, and files of a hub repository by their path.

    owner/name                              a data set; owner/name/config for one of its configs
    hf://datasets/owner/name/data/a.jsonl   one file of it, or several by a pattern (*)
    folder                                  written by save_to_disk, or with files that `load_dataset` knows

Only this module imports datasets and huggingface_hub, where they are needed. Every trouble is a PromptError.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from bruno_ray.errors import PromptError, first_line
from bruno_ray.prompts.formats.table import Record
from bruno_ray.prompts.slicing import Slice
from bruno_ray.settings import DatasetSettings

logger = logging.getLogger(__name__)

ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
ID_AND_CONFIG = re.compile(r"([\w.\-]+/[\w.\-]+)/([\w.\-]+)")
PATH = re.compile(r"hf://datasets/(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
PAGE = re.compile(
    r"https://huggingface\.co/datasets/(?P<id>[^/?#]+/[^/?#]+)"
    r"(?:/(?:blob|resolve|raw)/(?P<revision>[^/?#]+)/(?P<file>[^?#]+))?/?(?:[?#].*)?"
)


class Rows(NamedTuple):
    records: Iterable[Record]
    columns: Sequence[str]


@dataclass(frozen=True)
class HubFile:
    """A file of a data set's repository, or several by a pattern."""

    id: str
    file: str
    revision: str | None


def settled(settings: DatasetSettings) -> DatasetSettings:
    """Short forms of a hub data set written out: `owner/name/config`, `hf://datasets/owner/name`, its page's address.

    Raises PromptError if a config or a revision is named in two ways.
    """
    source = settings.source
    named: dict[str, str | None] = {}
    if match := ID_AND_CONFIG.fullmatch(source):
        named = {"source": match[1], "config": match[2]}
    elif (match := PATH.fullmatch(source) or PAGE.fullmatch(source)) and not match["file"]:
        named = {"source": match["id"], "revision": _revision(match["revision"])}
    for key in ("config", "revision"):
        if named.get(key) and getattr(settings, key) not in (None, named[key]):
            raise PromptError(f"{source} names a {key}, and `{key}` is {getattr(settings, key)!r}; leave one out")
    return settings.model_copy(update={key: value for key, value in named.items() if value is not None})


def hub_file(settings: DatasetSettings) -> HubFile | None:
    """The file that `source` names by a path on the hub; None if it is something else. Raises PromptError."""
    source = settings.source
    match = PATH.fullmatch(source) or PAGE.fullmatch(source)
    if match is None:
        if source.startswith(("hf://", "https://", "http://")):
            raise PromptError(
                f"{source} is not a known kind of path; write hf://datasets/OWNER/NAME/PATH, or download the file"
            )
        return None
    if not match["file"]:
        return None
    return HubFile(match["id"], unquote(match["file"]), _revision(match["revision"]) or settings.revision)


def _revision(text: str | None) -> str | None:
    """A revision as paths spell it: escaped, or by the name of the hub's own conversion."""
    return "refs/convert/parquet" if text == "~parquet" else unquote(text) if text else None


def download(wanted: HubFile) -> list[Path]:
    """The file, or all that its pattern matches, in the hub's cache. Raises PromptError."""
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    place = f"hf://datasets/{wanted.id}/{wanted.file}"
    repository: dict[str, Any] = {"repo_id": wanted.id, "repo_type": "dataset", "revision": wanted.revision}
    try:
        if "*" not in wanted.file:
            return [Path(huggingface_hub.hf_hub_download(filename=wanted.file, **repository))]
        folder = Path(huggingface_hub.snapshot_download(allow_patterns=wanted.file, **repository))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        matching = [path for path in paths if fnmatchcase(path.relative_to(folder).as_posix(), wanted.file)]
        if not matching:
            raise PromptError(f"{place}: no file of that data set matches; check the pattern")
        return sorted(matching)
    except errors.RepositoryNotFoundError as error:
        raise PromptError(f"{place}: not found on the hub, or gated; {ACCESS}") from error
    except errors.RevisionNotFoundError as error:
        raise PromptError(f"{place}: that data set has no revision {wanted.revision!r}; check it on the hub") from error
    except errors.RemoteEntryNotFoundError as error:
        raise PromptError(f"{place}: that data set has no such file; check the path on the hub") from error
    except (errors.LocalEntryNotFoundError, ConnectionError, httpx.TransportError) as error:
        raise PromptError(f"{place}: {NOT_REACHED}") from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise PromptError(f"{place}: cannot be loaded ({first_line(error)}); check path and network") from error


ACCESS = "check the id, and log in with `hf auth login` if it needs access"
NOT_REACHED = "the hub cannot be reached and nothing is cached; check the network, or give a file"


def saved_folder(path: Path, splits: list[Slice], place: str) -> Rows:
    """A folder written by `save_to_disk`."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise PromptError(f"{place}: cannot be loaded from disk ({first_line(error)}); save it again") from error
    by_name = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved, "train": saved}
    return _cut_splits(by_name, splits, place)


def hub_rows(settings: DatasetSettings, splits: list[Slice], limit: int) -> Rows:
    """Slices of a data set of the hub, or of a folder that is laid out as one."""
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


def _numbered(records: Iterable[dict[str, Any]], place: str, start: int) -> Iterator[Record]:
    return (Record(fields, f"{place}, row {number}") for number, fields in enumerate(records, start))


def _cut_splits(by_name: dict[str, Any], splits: list[Slice], place: str) -> Rows:
    """Slices of named `datasets.Dataset`s, chained."""
    columns = None
    slices = []
    for part in splits:
        if part.split not in by_name:
            raise PromptError(f"{place}: no split {part.split!r}; there are {', '.join(by_name)}")
        dataset = by_name[part.split]
        columns = columns or list(dataset.column_names)
        bounds = part.of(len(dataset))
        rows = dataset.select(range(bounds.start, max(bounds.start, bounds.stop)))
        slices.append(_numbered(rows, f"{place}, {part.split}", bounds.start))
    return Rows((record for rows in slices for record in rows), columns or [])


def _stream(by_name: dict[str, Any], splits: list[Slice], limit: int, place: str) -> Rows:
    """Rows of iterable data sets, read here so that a failing download is reported as one of this data set."""
    records: list[Record] = []
    for part in splits:
        if (part.start or part.stop) and not part.is_head and not (part.start.isdigit() and not part.stop):
            raise PromptError(
                f"{place}: a stream has no known length, so [{part.start}:{part.stop}] cannot be taken from it;"
                " write [a:b] or set streaming = false"
            )
        start = int(part.start or 0)
        stop = int(part.stop) if part.stop else start + limit
        records += _numbered(islice(iter(by_name[part.split]), start, stop), f"{place}, {part.split}", start)
    return Rows(records, list(dict.fromkeys(name for record in records for name in record.fields)))


def _hub_error(settings: DatasetSettings, splits: list[Slice], place: str, error: Exception) -> PromptError:
    """Says which config or split exists if that is what went wrong, else the first line of the error."""
    import datasets

    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return PromptError(f"{place}: no folder here, and on the hub not found, or gated; {ACCESS}")
    if isinstance(error, ConnectionError):
        return PromptError(f"{place}: no folder here, and {NOT_REACHED}")
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
