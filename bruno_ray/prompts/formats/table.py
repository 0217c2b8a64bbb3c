"""What every reader of a file is given and gives back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LONGEST_EXCERPT = 60


class Record(NamedTuple):
    """One row, and where it stands, as people look it up: `a.csv:7`, or `a.parquet, row 7`."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Table:
    records: Sequence[Record]
    notes: tuple[str, ...] = ()
    """What the reader has inferred and the file does not say itself: an encoding, a separator, a missing header."""


@dataclass(frozen=True)
class Given:
    """What is known of a file before it is read."""

    place: str
    """Its name, for messages."""

    encoding: str | None = None
    """None: the file says itself, or it is inferred."""

    separator: str | None = None
    """Between the fields of a .csv; None: inferred."""

    columns: tuple[str, ...] = ()
    """Columns that are looked for."""


def columns_of(records: Iterable[Record]) -> list[str]:
    """Names of all columns, in the order in which they turn up."""
    return list(dict.fromkeys(name for record in records for name in record.fields))


def excerpt(text: str) -> str:
    """The beginning of a text, quoted, on one line, printable anywhere."""
    return repr(text if len(text) <= LONGEST_EXCERPT else text[: LONGEST_EXCERPT - 3] + "...")
