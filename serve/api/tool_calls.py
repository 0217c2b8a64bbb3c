"""Calls of tools, as they are found in the answers of models.

A model calls a tool by writing text of a form that its chat template teaches. Three forms are read, told by what the
template says:

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one or several    Hermes 2 and 3, Qwen 2.5 and 3
    llama     {"name": ..., "parameters": {...}}, the whole answer                        Llama 3.1 to 3.3
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]                        Mistral 0.3, Nemo, Small 2409

Text that is no call of a tool that was offered stays text: nothing is lost when a model makes one up.
"""

import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bruno_ray.generation.text_stream import StopScanner

HERMES_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""What Mistral's templates ask for; the others take any id."""


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """With a new id."""
        made = "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": made, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models calls tools."""

    name: str
    marker: str
    """Where calls begin; empty if the whole answer is one."""

    find: Callable[[str], list[Call]]
    """Calls in a whole answer; none if anything in their place is no call."""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(found: Any, arguments: str) -> Call | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    given = found.get(arguments, {})
    return Call(found["name"], given) if isinstance(given, dict) else None


def _all(found: Sequence[Call | None]) -> list[Call]:
    calls = [call for call in found if call is not None]
    return calls if len(calls) == len(found) else []


def _hermes(text: str) -> list[Call]:
    return _all([_call(_json(inside), "arguments") for inside in HERMES_CALL.findall(text)])


def _mistral(text: str) -> list[Call]:
    try:
        found, _ = json.JSONDecoder().raw_decode(text.partition(MISTRAL.marker)[2].lstrip())
    except (ValueError, RecursionError):
        return []
    return _all([_call(entry, "arguments") for entry in (found if isinstance(found, list) else [found])])


def _llama(text: str) -> list[Call]:
    calls, rest = [], text.strip()
    while rest:  # several are separated by a semicolon
        try:
            found, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        calls.append(_call(found, "parameters"))
        rest = rest[end:].lstrip("; \n")
    return _all(calls)


HERMES = ToolFormat("hermes", "<tool_call>", _hermes)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", _mistral)
LLAMA = ToolFormat("llama", "", _llama)


def tool_format_of(template: str) -> ToolFormat | None:
    """The form that a chat template teaches or writes; None for one that is not known, or no tools at all."""
    if HERMES.marker in template and "<function=" not in template and "arguments" in template:
        return HERMES
    if MISTRAL.marker in template and "[ARGS]" not in template:
        return MISTRAL
    if '{"name": function name, "parameters":' in template:
        return LLAMA
    return None


class AnswerReader:
    """Separates one answer into text for the user and calls, while it comes in. Text that may be the beginning of a
    call is held back."""

    def __init__(self, form: ToolFormat | None, names: Sequence[str], parallel: bool = True) -> None:
        """``names`` are those of the tools that were offered; None if there were none. Not ``parallel``: only the first
        call counts."""
        self._form = form
        self._names = frozenset(names)
        self._parallel = parallel
        self._scanner = StopScanner((form.marker,) if form is not None and form.marker else ())
        self._text = ""
        self._shown = 0

    def push(self, piece: str) -> str:
        """What of the answer can be shown by now."""
        if self._form is None:
            return piece
        self._text += piece
        if self._form.marker:
            shown = self._scanner.push(piece)
        elif self._text.lstrip()[:1] in ("", "{"):
            shown = ""
        else:
            shown = self._text[self._shown :]
        self._shown += len(shown)
        return shown

    def finish(self, ended: bool) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls: there is one or the other. An answer that has not ``ended`` by itself
        calls nothing."""
        calls = self._form.find(self._text) if self._form is not None and ended else []
        if calls and all(call.name in self._names for call in calls):
            return "", calls if self._parallel else calls[:1]
        return self._text[self._shown :], []
