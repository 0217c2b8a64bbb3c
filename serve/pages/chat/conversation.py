"""What one side of the page remembers: its turns, as plain dicts that live in the browser's storage.

A turn is ``{"user", "answer", "model", "finish", "error", "tokens", "seconds"}``. ``finish`` is None while the answer
is being written; ``error`` is the one line of an answer that failed; ``tokens`` and ``seconds`` are of the answer.
"""

from collections.abc import Sequence
from typing import Any

Turn = dict[str, Any]


def new_turn(user: str, model: str) -> Turn:
    return {
        "user": user,
        "answer": "",
        "model": model,
        "finish": None,
        "error": None,
        "tokens": None,
        "seconds": None,
    }


def finished(turns: Sequence[Turn]) -> list[Turn]:
    """Without the turns whose answers were never written, as after a reload in the middle of one."""
    return [turn for turn in turns if turn["finish"] or turn["error"] or turn["answer"]]


def messages(turns: Sequence[Turn], system: str) -> list[dict[str, str]]:
    """What the model is sent for the last turn. Turns without an answer are left out, so roles alternate."""
    *earlier, last = turns
    conversation = [{"role": "system", "content": system}] if system.strip() else []
    for turn in earlier:
        if turn["answer"]:
            conversation += [
                {"role": "user", "content": turn["user"]},
                {"role": "assistant", "content": turn["answer"]},
            ]
    return [*conversation, {"role": "user", "content": last["user"]}]


def bubbles(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as the chatbot shows them."""
    shown = []
    for turn in turns:
        shown.append({"role": "user", "content": turn["user"]})
        answer = turn["answer"]
        if turn["error"]:
            answer = "\n\n".join(filter(None, [answer, f"Error: {turn['error']}"]))
        elif turn["finish"] and not answer:
            answer = "(empty answer)"
        if answer:
            shown.append({"role": "assistant", "content": answer})
    return shown


def caption(turns: Sequence[Turn]) -> str:
    """One line about the last answer: who gave it, how long it is, how fast it came, why it ended."""
    if not turns:
        return ""
    turn = turns[-1]
    parts = [turn["model"]]
    if turn["tokens"] is not None:
        parts.append(f"{turn['tokens']} tokens")
    if turn["tokens"] and turn["seconds"]:
        parts.append(f"{turn['tokens'] / turn['seconds']:.1f} tokens/s")
    reasons = {None: "writing", "length": "cut at the token limit", "stopped": "stopped"}
    if turn["error"]:
        parts.append("failed")
    elif turn["finish"] != "stop":
        parts.append(reasons.get(turn["finish"], turn["finish"]))
    return " | ".join(parts)
