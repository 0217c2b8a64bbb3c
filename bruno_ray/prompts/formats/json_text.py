"""JSON files: an object or a text per line (.jsonl), or one array of them (.json).

Both may lie under either name: what half of the world calls .json has a row per line.
"""

import json
import logging
from typing import Any

from bruno_ray.errors import PromptError, first_line
from bruno_ray.prompts.formats.encodings import decode
from bruno_ray.prompts.formats.table import Given, Record, Table, excerpt

logger = logging.getLogger(__name__)


def read_json_lines(content: bytes, given: Given) -> Table:
    """One object, or one text, per line. Raises PromptError with the line that is neither."""
    text, note = decode(content, given.place, given.encoding)
    if text.lstrip().startswith("[") and (whole := _whole(text)) is not None:
        return _table(_rows(whole, given.place), given, note, "one JSON array, not one row per line")
    return _read_lines(text, given, note)


def read_json(content: bytes, given: Given) -> Table:
    """An array of objects or texts, or an object with such an array. Raises PromptError."""
    text, note = decode(content, given.place, given.encoding)
    if not text.strip():
        return Table(())
    whole = _whole(text)
    if whole is not None:
        return _table(_rows(whole, given.place), given, note)
    lines = [line for line in _lines(text) if line.strip()]
    if len(lines) > 1 and _whole(lines[0]) is not None:
        return _read_lines(text, given, note, "one row per line, not one JSON array")
    _loads(text, given.place)  # says what is wrong, and in which line
    raise PromptError(f"{given.place}: {excerpt(text)} holds no rows; {SHAPES}")


SHAPES = 'write an array of texts or of objects such as {"prompt": "..."}'


def _whole(text: str) -> Any:
    """The one value that a text is; None where it is not JSON (or null, which has no rows either)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _loads(text: str, place: str, line: int = 1) -> Any:
    """`line` is that of the beginning of `text`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = _lines(text)[error.lineno - 1]
        raise PromptError(
            f"{place}:{line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}): {excerpt(shown)}; fix"
            " that line"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise PromptError(
            f"{place}:{line}: not JSON that can be read ({first_line(error)}): {excerpt(text)}; fix that line"
        ) from None


def _lines(text: str) -> list[str]:
    """Unlike `splitlines`, at line feeds alone: texts may hold the other characters that count as ends of lines."""
    return text.split("\n")


def _read_lines(text: str, given: Given, *notes: str | None) -> Table:
    rows = []
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            rows.append((_loads(line, given.place, number), f"{given.place}:{number}"))
    return _table(rows, given, *notes)


def _rows(whole: Any, place: str) -> list[tuple[Any, str]]:
    """(row, where) of an array, or of the one array in an object. Lines are not known here."""
    name = ""
    if isinstance(whole, dict):
        arrays = [key for key, value in whole.items() if isinstance(value, list)]
        if len(arrays) != 1:
            held = f"the arrays {', '.join(map(repr, arrays))}" if arrays else "no array"
            raise PromptError(f"{place}: an object with {held}: which are the rows is not known; {SHAPES}")
        name, whole = arrays[0], whole[arrays[0]]
    if not isinstance(whole, list):
        raise PromptError(f"{place}: {excerpt(json.dumps(whole))} holds no rows; {SHAPES}")
    return [(row, f"{place}, item {number}{f' of {name!r}' if name else ''}") for number, row in enumerate(whole, 1)]


def _table(rows: list[tuple[Any, str]], given: Given, *notes: str | None) -> Table:
    """Records of rows that are all objects, or all texts."""
    records, damaged = [], []
    kind = type(rows[0][0]) if rows else dict
    for row, where in rows:
        if not isinstance(row, dict | str):
            raise PromptError(f"{where}: {excerpt(json.dumps(row))} is neither a text nor an object; {SHAPES}")
        if type(row) is not kind:
            raise PromptError(
                f"{where}: {excerpt(json.dumps(row))} is {_called(row)}, where the first row is {_called(rows[0][0])};"
                " write all rows alike"
            )
        mended = whole_characters(row)
        if mended is not row:
            damaged.append(where)
        records.append(Record({"text": mended} if isinstance(mended, str) else mended, where))
    if damaged:
        logger.warning(
            "%s: half a surrogate pair is no character and is replaced by U+FFFD (rows like it: %d)",
            *(damaged[0], len(damaged)),
        )
    return Table(records, tuple(note for note in notes if note))


def _called(row: Any) -> str:
    return "a text" if isinstance(row, str) else "an object"


def whole_characters(value: Any) -> Any:
    """The same object where all its texts can be written as UTF-8; else a copy, with U+FFFD for what cannot.

    JSON can spell one half of a surrogate pair (`\\ud83d`), as programs write it that cut a text in the middle of one.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value
    if isinstance(value, dict):
        mended = {whole_characters(key): whole_characters(item) for key, item in value.items()}
        same = all(a is c and b is d for (a, b), (c, d) in zip(value.items(), mended.items()))
        return value if same and len(mended) == len(value) else mended
    if isinstance(value, list):
        items = [whole_characters(item) for item in value]
        return value if all(a is b for a, b in zip(value, items)) else items
    return value
