"""Write the prompts of presets from the templates beside this file: python examples/presets/make_prompts.py [NAME ...]

    NAME.txt -> bruno_ray/presets/data/NAME_{target,baseline}_{train,validation,test}.jsonl

A template is a sentence with a gap and what fills it; disclaimers.txt explains how they are written. Columns: `prompt`;
`answer` and `category` where the template has one; in a part that is headed by `words` also the words of the filler
without articles and the like, which an answer to the point must repeat.
"""

import json
import re
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

TEMPLATES = Path(__file__).parent
DATA = Path(__file__).parents[2] / "bruno_ray" / "presets" / "data"

FUNCTION_WORDS = {
    *(
        "a",
        "an",
        "the",
        "my",
        "me",
        "our",
        "us",
        "his",
        "her",
        "their",
        "your",
        "you",
        "i",
        "it",
        "is",
        "at",
        "in",
        "on",
    ),
    *("of", "to", "for", "from", "with", "and", "or", "that", "this", "these", "what", "who", "whether", "if", "all"),
    *("new", "next", "last", "right", "now", "up"),
}


def rows(name: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(side, part, row) of every prompt of a preset, in the order of its file."""
    side = part = ""
    with_words: list[str] = []
    text = (TEMPLATES / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for number, line in enumerate(lines):
        if line.startswith("["):
            side, part, *with_words = line.strip("[]").split()
            continue
        if line.startswith(" "):
            continue
        before, fillers, after = re.fullmatch(r"(.*)\{(.*)\}(.*)", line).groups()
        notes = [note.strip() for note in takewhile(lambda line: line.startswith(" "), lines[number + 1 :])]
        wanted = next((note[2:] for note in notes if note.startswith("= ")), "")
        category = next((note[2:] for note in notes if note.startswith("@ ")), "")
        for filler in fillers.split("|"):
            row = {"prompt": before + filler + after}
            if wanted:
                row["answer"] = wanted.format(filler)
            if with_words:
                row["words"] = " ".join(content_words(filler))
            if category:
                row["category"] = category
            yield side, part, row


def content_words(text: str) -> list[str]:
    """The words of a filler that say something; all of them where none does."""
    words = re.findall(r"[\w'.:-]+", text.lower())
    return [word for word in words if word not in FUNCTION_WORDS] or words


def main() -> None:
    for name in sys.argv[1:] or sorted(file.stem for file in TEMPLATES.glob("*.txt")):
        parts: dict[tuple[str, str], list[dict[str, str]]] = {}
        for side, part, row in rows(name):
            parts.setdefault((side, part), []).append(row)
        for (side, part), content in parts.items():
            file = DATA / f"{name}_{side}_{part}.jsonl"
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
            print(f"{file.name}: {len(content)} prompts")


if __name__ == "__main__":
    main()
