"""CSV and TSV files, with what people leave out: the name of the separator, and the header.

`csv.Sniffer` is not used: it finds separators by how often letters occur, so that it has one for a single column of
sentences, and none for quoted texts of several lines. Here a separator is one that the whole file agrees with.
"""

import csv
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

from bruno_ray.errors import PromptError
from bruno_ray.prompts.formats.encodings import decode
from bruno_ray.prompts.formats.table import Given, Record, Table, excerpt

SEPARATORS = (",", ";", "\t", "|")
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

STATED = re.compile(r'"?sep=([^\w\s"]|\t)"?\r?\n', re.IGNORECASE)
"""A first line with which Excel is told the separator."""


class Line(NamedTuple):
    """One record of a file, which may go over several lines, and the first of them, from 1."""

    cells: list[str]
    number: int


class Parsed(NamedTuple):
    lines: list[Line]
    problem: tuple[int, str] | None = None
    """Line and reason where the file is not CSV with this separator."""

    @property
    def width(self) -> int:
        return len(self.lines[0].cells) if self.lines else 0

    @property
    def is_even(self) -> bool:
        return self.problem is None and all(len(line.cells) == self.width for line in self.lines)


def read_csv(content: bytes, given: Given) -> Table:
    """Columns by the header, or numbered from 1 where the first line is no header.

    Raises PromptError with the line that does not fit, or where the separator cannot be told.
    """
    text, note = decode(content, given.place, given.encoding)
    if given.separator is not None:
        if len(given.separator) != 1 or given.separator in '"\r\n':
            raise PromptError(f"{given.place}: separator {given.separator!r} is not one character; write ; or another")
        return _table(_parse(text, given.separator), text, given, note)
    if stated := STATED.match(text):
        rest = "\n" + text[stated.end() :]  # lines keep their numbers
        return _table(_parse(rest, stated[1]), rest, given, note)
    separator = _separator(text, given)
    said = None if separator == "," else f"separated by {NAMES[separator]}, which is inferred"
    return _table(_parse(text, separator), text, given, note, said)


def read_tsv(content: bytes, given: Given) -> Table:
    """As `read_csv`, separated by tabs."""
    text, note = decode(content, given.place, given.encoding)
    return _table(_parse(text, given.separator or "\t"), text, given, note)


def _separator(text: str, given: Given) -> str:
    """The one that makes a column that is looked for, or else the one that every line agrees with.

    A comma if there is none: then the file has one column, or lines that will be refused by name.
    """
    begun = {separator: _parse(text, separator, at_most=1) for separator in SEPARATORS}
    wide = {separator: found.lines[0] for separator, found in begun.items() if found.width > 1}
    named = [separator for separator, line in wide.items() if _is_named(line, given)]
    if len(named) == 1:
        return named[0]
    even = [separator for separator in wide if _parse(text, separator).is_even]
    for candidates in (named, even, list(wide)):
        if len(candidates) == 1:
            return candidates[0]
        if len(candidates) > 1:
            first = wide[candidates[0]].number
            raise PromptError(
                f"{given.place}:{first}: {excerpt(_source(text, first))} may be separated by"
                f" {' or '.join(NAMES[separator] for separator in candidates)}; set `separator`, or make it a .txt file"
                " with one prompt per line"
            )
    return ","


@contextmanager
def _long_fields() -> Iterator[None]:
    """Without it a field of more than 128 kB is refused."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parse(text: str, separator: str, at_most: int | None = None) -> Parsed:
    """Records; lines without anything on them are left out. Blanks after a separator are no part of a field."""
    lines: list[Line] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    number = 1
    with _long_fields():
        try:
            for cells in reader:
                if len(cells) > 1 or "".join(cells).strip():
                    lines.append(Line(cells, number))
                if at_most is not None and len(lines) == at_most:
                    break
                number = reader.line_num + 1
        except csv.Error as error:
            return Parsed(lines, (number, str(error)))
    return Parsed(lines)


def _table(parsed: Parsed, text: str, given: Given, *notes: str | None) -> Table:
    if parsed.problem is not None:
        number, reason = parsed.problem
        raise PromptError(
            f"{given.place}:{number}: not CSV ({reason}): {excerpt(_source(text, number))}; fix that line, and write"
            ' "" for a quotation mark within quotes'
        )
    if not parsed.lines:
        return Table(())
    header, rows = _header(parsed, given)
    if rows is parsed.lines:
        said = "without a header"
    elif len(header) == 1 and not _is_named(parsed.lines[0], given):
        said = f"its first line, {excerpt(header[0])}, taken for a header"
    else:
        said = None
    for line in rows:
        if len(line.cells) > len(header):
            raise PromptError(
                f"{given.place}:{line.number}: {len(line.cells)} fields, where the first line has {len(header)}:"
                f" {excerpt(_source(text, line.number))}; quote texts that hold the separator, set `separator`, or make"
                " it a .txt file with one prompt per line"
            )
    records = [Record(dict(zip_longest(header, line.cells)), f"{given.place}:{line.number}") for line in rows]
    return Table(records, tuple(note for note in (*notes, said) if note))


def _header(parsed: Parsed, given: Given) -> tuple[list[str], list[Line]]:
    """Names of the columns, and the lines that are rows: all of them where the first is no header.

    Raises PromptError if it can be either.
    """
    first, others = parsed.lines[0], parsed.lines[1:]
    cells = [cell.strip() for cell in first.cells]
    numbered = [str(number) for number in range(1, len(cells) + 1)]
    if not _is_named(first, given):
        like_names = all(map(_like_a_name, cells)) and len(set(cells)) == len(cells)
        if not like_names or (len(cells) == 1 and " " in cells[0]):
            return numbered, parsed.lines
        if len(cells) == 1 and all(_like_a_name(line.cells[0].strip()) for line in others):
            raise PromptError(
                f"{given.place}:{first.number}: {excerpt(cells[0])} may be a header or a prompt; put a line `prompt`"
                " first"
            )
    names = [cell or number for cell, number in zip(cells, numbered)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise PromptError(f"{given.place}:{first.number}: two columns are called {min(twice)!r}; rename one")
    return names, others


def _is_named(line: Line, given: Given) -> bool:
    """Whether a column that is looked for is among the cells."""
    wanted = {name.casefold() for name in given.columns}
    return any(cell.strip().casefold() in wanted for cell in line.cells)


def _like_a_name(text: str) -> bool:
    return re.fullmatch(r"[^\W\d][\w.\-]*( [\w.\-]+){0,2}", text) is not None and len(text) <= 40


def _source(text: str, number: int) -> str:
    """A line of the file as it stands there."""
    lines = io.StringIO(text, newline="")
    return next((line.rstrip("\r\n") for at, line in enumerate(lines, start=1) if at == number), "")
