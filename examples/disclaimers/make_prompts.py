"""Write the prompts of the preset `disclaimers` from templates.txt: python examples/disclaimers/make_prompts.py

    bruno_ray/presets/data/disclaimers_{target,baseline}_{train,validation,test}.jsonl

Columns: `prompt`; `answer` where the template has one; in the target test part `words`, the words of the request that
an answer to the point must repeat (those of the filler without articles and the like).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates.txt")
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


def rows() -> Iterator[tuple[str, str, dict[str, str]]]:
    """(side, part, row) of every prompt, in the order of the file."""
    side = part = ""
    lines = [line for line in TEMPLATES.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for number, line in enumerate(lines):
        if line.startswith("["):
            side, part = line.strip("[]").split()
            continue
        if line.startswith(" "):
            continue
        before, fillers, after = re.fullmatch(r"(.*)\{(.*)\}(.*)", line).groups()
        following = lines[number + 1] if number + 1 < len(lines) else ""
        wanted = following.strip().removeprefix("= ") if following.startswith(" ") else ""
        for filler in fillers.split("|"):
            row = {"prompt": before + filler + after}
            if wanted:
                row["answer"] = wanted.format(filler)
            if (side, part) == ("target", "test"):
                row["words"] = " ".join(content_words(filler))
            yield side, part, row


def content_words(text: str) -> list[str]:
    """The words of a filler that say something; all of them where none does."""
    words = re.findall(r"[\w'.:-]+", text.lower())
    return [word for word in words if word not in FUNCTION_WORDS] or words


def main() -> None:
    parts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for side, part, row in rows():
        parts.setdefault((side, part), []).append(row)
    for (side, part), content in parts.items():
        file = DATA / f"disclaimers_{side}_{part}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
        print(f"{file.name}: {len(content)} prompts")


if __name__ == "__main__":
    main()
