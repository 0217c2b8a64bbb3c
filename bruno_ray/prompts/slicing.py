"""Which rows of which split: `train[:400]`, `[10%:]`, `train+test`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from bruno_ray.errors import PromptError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Slice:
    """`name[start:stop]`: a split and which of its rows. Bounds are row numbers or percentages; - is from the end."""

    split: str
    start: str = ""
    stop: str = ""

    @property
    def is_head(self) -> bool:
        """True for `name[:n]` and `name[a:b]`, whose rows can be streamed without knowing how many there are."""
        return self.stop.isdigit() and (not self.start or self.start.isdigit())

    def of(self, n: int) -> slice:
        """Absolute bounds in a split of `n` rows."""
        return slice(self._bound(self.start, 0, n), self._bound(self.stop, n, n))

    @staticmethod
    def _bound(text: str, default: int, n: int) -> int:
        if not text:
            return default
        bound = round(n * float(text[:-1]) / 100) if text.endswith("%") else int(text)
        return max(0, min(n, bound + n if text.startswith("-") else bound))


_SLICE = re.compile(r"\s*([\w.\-]*)\s*(?:\[\s*(-?\d+(?:\.\d+)?%?)?\s*:\s*(-?\d+(?:\.\d+)?%?)?\s*\])?\s*")


def parse_split(text: str) -> list[Slice]:
    """`train[:400]`, `[10%:]`, `train+test` as slices; an omitted name is `train`. Raises PromptError."""
    parts = []
    for item in text.split("+"):
        match = _SLICE.fullmatch(item)
        bounds = [bound for bound in (match.groups()[1:] if match else ()) if bound]
        if match is None or any("." in bound and not bound.endswith("%") for bound in bounds):
            raise PromptError(
                f"split {text!r} is not understood; write a split name, a slice such as train[:400], test[100:200] or"
                " [10%:], or several joined by +"
            )
        parts.append(Slice(match[1] or "train", match[2] or "", match[3] or ""))
    return parts


def cut(items: Sequence[Item], part: Slice) -> Sequence[Item]:
    return items[part.of(len(items))]


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """``n`` of them, far apart: neighbours in a data set are often alike."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]
