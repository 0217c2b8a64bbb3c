"""How well a reader of answers agrees with labels by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bruno_ray.errors import PromptError, first_line

COLUMNS = {"side": str, "prompt": str, "answer": str, "shows": bool}
SIDES = ("target", "baseline")


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer that somebody has read."""

    side: str
    """`target` or `baseline`."""

    prompt: str
    answer: str
    shows: bool
    """Whether it shows the behaviour."""


@dataclass(frozen=True)
class Agreement:
    """A reader's verdicts against labels, as counts."""

    both: int
    """Both say that the answer shows the behaviour."""

    reader_only: int
    label_only: int
    neither: int

    @classmethod
    def of(cls, labels: Sequence[bool], verdicts: Sequence[bool]) -> "Agreement":
        """Raises ValueError if there are not as many of the one as of the other."""
        pairs = list(zip(labels, verdicts, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))))

    @property
    def total(self) -> int:
        return self.both + self.reader_only + self.label_only + self.neither

    @property
    def precision(self) -> float:
        """Share of what the reader takes for the behaviour that is it; NaN if it takes nothing for it."""
        return _share(self.both, self.both + self.reader_only)

    @property
    def recall(self) -> float:
        """Share of the behaviour that the reader sees; NaN if there is none."""
        return _share(self.both, self.both + self.label_only)

    @property
    def kappa(self) -> float:
        """Cohen's kappa (Cohen 1960): agreement beyond that of chance, 1 if perfect, 0 if none.

        NaN where it is not defined: all answers have the same label, and the reader says the same of all.
        """
        n = self.total
        if not n:
            return float("nan")
        yes = (self.both + self.label_only) * (self.both + self.reader_only)
        no = (self.neither + self.reader_only) * (self.neither + self.label_only)
        chance = (yes + no) / n**2
        return _share((self.both + self.neither) / n - chance, 1 - chance)


def kappa(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Cohen's kappa of two readers; see `Agreement.kappa`."""
    return Agreement.of(a, b).kappa


def read_labels(path: Path) -> list[LabelledAnswer]:
    """A .jsonl file whose rows have `side`, `prompt`, `answer` and `shows` (true or false).

    Raises PromptError if it is not there, is no such file or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` ends lines within answers as well
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"the labels {path} cannot be read ({first_line(error)}): check the name") from error
    rows = [_row(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise PromptError(f"the labels {path} are empty: write one row per answer, with {', '.join(COLUMNS)}")
    return rows


def _row(path: Path, number: int, line: str) -> LabelledAnswer:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{path}, line {number} is not JSON ({first_line(error)}): fix it") from error
    if not isinstance(row, dict):
        raise PromptError(f"{path}, line {number} is not a row: write an object with {', '.join(COLUMNS)}")
    wrong = [name for name, kind in COLUMNS.items() if not isinstance(row.get(name), kind)]
    if wrong:
        has = ", ".join(map(str, row)) or "none"
        raise PromptError(
            f"{path}, line {number}: {', '.join(wrong)} missing or of another type (its columns are {has}): a row has"
            " side, prompt and answer as text and shows as true or false"
        )
    if row["side"] not in SIDES:
        raise PromptError(f"{path}, line {number}: side is {row['side']!r}: write target or baseline")
    return LabelledAnswer(row["side"], row["prompt"], row["answer"], row["shows"])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
