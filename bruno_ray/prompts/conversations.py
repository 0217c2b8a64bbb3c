"""Prompts that lie in a data set as conversations: the last user turn is the prompt, a system turn is kept.

Two forms are about: OpenAI's `{"role": "user", "content": ...}`, in a column `messages`, and ShareGPT's
`{"from": "human", "value": ...}`, in a column `conversations`. A CSV file holds either as JSON text.
"""

import json
from typing import Any, NamedTuple

CHAT_COLUMNS = ("messages", "conversations", "conversation")

USER = ("user", "human", "prompter")
SYSTEM = ("system", "developer")


class Asked(NamedTuple):
    user: str
    system: str | None
    is_cut: bool
    """Whether turns before the last user turn are left out."""


def conversation_of(value: Any) -> list[dict[str, Any]] | None:
    """The turns, if a value of a column is a conversation, as a list or as JSON text of one; else None."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, dict):  # `datasets` turns a sequence of structs inside out
        value = _turned(value)
    if not isinstance(value, list) or not value:
        return None
    is_chat = all(isinstance(turn, dict) and (_role(turn) is not None) for turn in value)
    return value if is_chat else None


def _turned(columns: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`{"role": [...], "content": [...]}` as turns; None if it is something else."""
    lists = list(columns.values())
    if not lists or not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        return None
    return [dict(zip(columns, row)) for row in zip(*lists)]


def asked(turns: list[dict[str, Any]]) -> Asked | None:
    """What the last user turn asks; None without one that says something.

    Raises ValueError if the turn, or the system's, holds what is no text, such as an image.
    """
    users = [number for number, turn in enumerate(turns) if _role(turn) in USER]
    if not users:
        return None
    system = [text for turn in turns[: users[-1]] if _role(turn) in SYSTEM and (text := _text(turn)).strip()]
    user = _text(turns[users[-1]])
    if not user.strip():
        return None
    before = [turn for turn in turns[: users[-1]] if _role(turn) not in SYSTEM]
    return Asked(user, "\n\n".join(system) or None, bool(before))


def _role(turn: dict[str, Any]) -> str | None:
    role = turn.get("role", turn.get("from"))
    return role.lower() if isinstance(role, str) else None


def _text(turn: dict[str, Any]) -> str:
    content = turn.get("content", turn.get("value"))
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"its content is {type(content).__name__}")
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a part of its content is not text")
    return "\n".join(parts)
