"""Answers of an unedited model on disk, so that they are made once: by this run when it goes on, and by the next one.

Preparing the scorers is mostly answering the same prompts with the same model. Each batch is appended when it is done,
so a preparation that was killed has lost one batch. A line that was cut off is passed over.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bruno_ray.files import output_errors
from bruno_ray.generation.decoding import Response, TokenIds

FORMAT = 1


class KeptAnswers:
    """Answers of one model under one rule of when an answer is decided, in one file.

    Args:
        folder: is made if need be; of all models.
        **what: everything that an answer depends on beside its prompt and its length.

    Raises:
        OutputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, **what: Any) -> None:
        name = hashlib.sha256(json.dumps([FORMAT, what], sort_keys=True).encode()).hexdigest()[:32]
        self._path = folder / f"{name}.jsonl"
        self._known: dict[str, Response] = {}
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        for line in filter(None, lines):
            try:
                key, tokens, *rest = json.loads(line)
                self._known[key] = Response(tuple(tokens), "", *rest)
            except (ValueError, TypeError):  # cut off by a kill, or damaged: that answer is made again
                continue

    def find(self, prompt: TokenIds, max_new_tokens: int, decided: bool) -> Response | None:
        """Without its text. ``decided``: whether an answer is left once it is decided."""
        return self._known.get(_key(prompt, max_new_tokens, decided))

    def add(self, prompts: Sequence[TokenIds], max_new_tokens: int, decided: bool, answers: Sequence[Response]) -> None:
        """Raises OutputError if they cannot be written."""
        new = {_key(prompt, max_new_tokens, decided): answer for prompt, answer in zip(prompts, answers)}
        rows = [[key, list(a.token_ids), a.ended, a.decided, a.finite, a.end_id] for key, a in new.items()]
        # In one write, behind a line's end: another process appends here as well, and one that was killed may have
        # left half a line.
        text = "\n" + "".join(json.dumps(row) + "\n" for row in rows)
        with output_errors(self._path.parent):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        self._known |= new


def _key(prompt: TokenIds, max_new_tokens: int, decided: bool) -> str:
    content = json.dumps([[int(token) for token in prompt], max_new_tokens, decided])
    return hashlib.sha256(content.encode()).hexdigest()[:24]
