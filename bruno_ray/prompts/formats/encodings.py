"""Bytes of a text file as text. What the file does not say itself is said out loud, what is doubtful is refused.

UTF-8, and whatever begins with a byte order mark, says itself. Two more are inferred: UTF-16 without a mark, by its
NUL bytes, and cp1252 (Western European; the printable part of latin-1 is in it), by what it may not look like. Other
encodings are given by `encoding`: nobody can tell them apart by a few lines.
"""

import codecs
import re
from typing import NamedTuple

from bruno_ray.errors import PromptError
from bruno_ray.prompts.formats.table import excerpt

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
"""Characters beyond ASCII as UTF-8 writes them."""

BEYOND_ASCII = bytes(range(0x80, 0x100))

MARKS_OF_TYPE = "\xa0‘’“”«»‚„‹›…–—•€£§°·¿¡©®™"
FOREIGN = re.compile(rf"[^\x00-\x7f{MARKS_OF_TYPE}]{{3,}}")
"""Three letters beyond ASCII in a row: no word of a language that cp1252 was made for, but every word in Cyrillic or
Chinese that is read as cp1252."""

SURE = 10
"""What speaks for an encoding must outnumber what speaks against it by this."""


class Decoded(NamedTuple):
    text: str
    note: str | None
    """How it was read, where the file does not say so itself."""


def decode(content: bytes, place: str, encoding: str | None = None) -> Decoded:
    """The text of a file in `encoding`, or, without it, in the one that it says or that can be inferred.

    Raises PromptError, with the line, if it is not in the encoding that was given, or in no one that can be inferred.
    """
    if encoding is not None:
        return Decoded(_strictly(content, place, encoding).removeprefix("\ufeff"), None)
    for mark, name in MARKS:
        if content.startswith(mark):
            return Decoded(_strictly(content[len(mark) :], place, name), None)
    if b"\0" in content:
        return _without_mark(content, place)
    try:
        return Decoded(content.decode("utf-8"), None)
    except UnicodeDecodeError as error:
        return _western(content, place, error.start)


def _strictly(content: bytes, place: str, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "replace").count("\n") + 1
        raise PromptError(
            f"{place}:{line}: {_around(content, error.start)} is not {encoding}; fix that line, or set `encoding` to"
            " what the file is in"
        ) from None
    except (LookupError, UnicodeError) as error:
        raise PromptError(
            f"{place}: encoding {encoding!r} is not known ({error}); write its usual name, such as utf-8 or cp1251"
        ) from None


def _without_mark(content: bytes, place: str) -> Decoded:
    """UTF-16 without a byte order mark, in which most Western characters have a NUL byte on the same side."""
    even, odd = content[0::2].count(0), content[1::2].count(0)
    if 8 * (even + odd) >= len(content) and min(even, odd) * SURE < max(even, odd):
        name = "utf-16-be" if even > odd else "utf-16-le"
        return Decoded(_strictly(content, place, name), f"read as {name}, which it does not say")
    position = content.index(b"\0")
    raise PromptError(
        f"{place}:{_line(content, position)}: {_around(content, position)} holds NUL bytes, as no text file does; save"
        " it as UTF-8, or set `encoding`"
    )


def _western(content: bytes, place: str, position: int) -> Decoded:
    """A file that is not UTF-8 from `position` on, if nothing speaks against cp1252."""
    found = MULTIBYTE.findall(content)
    strange = len(content) - len(content.translate(None, BEYOND_ASCII)) - sum(map(len, found))
    if strange < SURE * len(found):
        raise PromptError(
            f"{place}:{_line(content, position)}: {_around(content, position)} is not UTF-8, though parts of the file"
            " are; fix that line, or set `encoding` to what the file is in"
        )
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as error:
        raise _unknown(place, _line(content, error.start), _around(content, error.start)) from None
    if foreign := FOREIGN.search(text):
        start = foreign.start()
        raise _unknown(place, text.count("\n", 0, start) + 1, _around(content, start))
    word = re.search(r"\w*[^\W\x00-\x7f]\w*", text) or re.search(r"\S*[^\x00-\x7f]\S*", text)
    return Decoded(text, f"read as cp1252, which it does not say, as in {excerpt(word[0] if word else '')}")


def _unknown(place: str, line: int, around: str) -> PromptError:
    return PromptError(
        f"{place}:{line}: {around} is neither UTF-8 nor cp1252; save the file as UTF-8, or set `encoding` to what it"
        " is in"
    )


def _line(content: bytes, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def _around(content: bytes, position: int) -> str:
    """The bytes about a place, on its line."""
    begin = max(content.rfind(b"\n", 0, position) + 1, position - 20)
    return repr(content[begin : position + 20].partition(b"\n")[0] or content[position : position + 20])
