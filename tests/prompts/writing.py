"""Prompt files that tests write."""

import json
from pathlib import Path

LETTERS = [f"question {letter}" for letter in "abcdefghij"]


def write_jsonl(path: Path, texts: list[str], **columns: str) -> str:
    path.write_text("".join(json.dumps({"prompt": text, **columns}) + "\n" for text in texts))
    return path.name
