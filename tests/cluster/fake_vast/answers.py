"""Answers as Vast.ai words them."""

import json
from dataclasses import dataclass, replace
from typing import Any


class NoAnswer(Exception):
    """The client hears nothing, or (`refused`) is not let in."""

    def __init__(self, refused: bool = False) -> None:
        super().__init__("no answer")
        self.refused = refused


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json(cls, content: Any, status: int = 200) -> "Answer":
        return cls(status, json.dumps(content).encode())

    @classmethod
    def text(cls, content: str, status: int) -> "Answer":
        return cls(status, content.encode(), "text/plain")

    @classmethod
    def refusal(cls, code: str, message: str, status: int = 400, **more: Any) -> "Answer":
        return cls.json({"success": False, "error": code, "msg": message, **more}, status)

    def with_header(self, name: str, value: str) -> "Answer":
        return replace(self, headers=(*self.headers, (name, value)))


def offer_gone(shape: int, offer_id: int) -> Answer:
    """Somebody else has rented it: create_instance.yaml's 404 and 410, and a 400 that clients have met."""
    return [
        Answer.refusal(
            "invalid_args",
            f"error 404/3603: no_such_ask Instance type by id {offer_id} is not available.",
            404,
            ask_id=offer_id,
        ),
        Answer.refusal(
            "no_such_ask",
            f"error 410/3907: no_such_ask Instance type {offer_id} is no longer available.",
            410,
            ask_id=offer_id,
        ),
        Answer.refusal(
            "invalid_args", f"error 400/3603: no_such_ask Instance type by id {offer_id} is no longer available.", 400
        ),
    ][shape % 3]


def instance_gone(shape: int, number: object) -> Answer:
    """destroy_instance.yaml's 404, one that is no JSON, and the word that clients have met."""
    return [
        Answer.refusal("not_found", "Instance not found", 404),
        Answer.text("404: Not Found", 404),
        Answer.refusal("no_such_instance", f"Instance {number} not found.", 404),
    ][shape % 3]
