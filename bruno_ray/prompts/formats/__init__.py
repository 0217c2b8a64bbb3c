"""Files that prompts lie in: one entry of `FORMATS` per ending, each a function from bytes to a table."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

from bruno_ray.errors import PromptError, first_line
from bruno_ray.prompts.formats.delimited import read_csv, read_tsv
from bruno_ray.prompts.formats.encodings import decode
from bruno_ray.prompts.formats.json_text import read_json, read_json_lines
from bruno_ray.prompts.formats.table import Given, Record, Table

COMPRESSED = ".gz"
GZIP = b"\x1f\x8b"
"""What a compressed file begins with."""


def read_txt(content: bytes, given: Given) -> Table:
    """One prompt per line."""
    text, note = decode(content, given.place, given.encoding)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # `splitlines` ends lines within a text as well
    records = [
        Record({"text": line}, f"{given.place}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    return Table(records, (note,) if note else ())


def read_parquet(content: bytes, given: Given) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise PromptError(f"{given.place}: not a parquet file ({first_line(error)}); check the file") from None
    return Table([Record(row, f"{given.place}, row {number}") for number, row in enumerate(rows, 1)])


FORMATS: dict[str, Callable[[bytes, Given], Table]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_txt,
    ".parquet": read_parquet,
}
"""Ending -> reader. Each may be followed by .gz, and be in capitals."""


SEPARATED = (".csv", ".tsv")
"""Endings of files that `separator` is for."""


def format_of(name: str) -> str | None:
    """The ending of a file that can be read, as it is in FORMATS; None for any other."""
    ending = Path(name.lower().removesuffix(COMPRESSED)).suffix
    return ending if ending in FORMATS else None


def read_file(path: Path, given: Given) -> Table:
    """All rows of a file, by its ending. Raises PromptError if it cannot be read, or not without a guess."""
    ending = format_of(path.name)
    if ending is None:
        raise PromptError(f"{given.place}: a file must be one of {' '.join(FORMATS)}, or that and .gz; convert it")
    if given.separator is not None and ending not in SEPARATED:
        raise PromptError(f"{given.place}: `separator` is for {' and '.join(SEPARATED)}; leave it out")
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PromptError(f"{given.place}: cut off or damaged ({first_line(error)}); compress it again") from error
    except OSError as error:
        raise PromptError(f"{given.place}: cannot be read ({error.strerror or error}); check the file") from error
    return FORMATS[ending](content, given)
