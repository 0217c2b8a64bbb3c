"""Whether a text shows the behaviour, judged by substrings.

Markers are cheap and blunt: they miss evasion and hit innocent words (StrongREJECT, Souly et al. 2024, table 1). So
they steer the search together with measures that look at more than words.
"""

from collections.abc import Iterable

from bruno_ray.errors import SettingsError

_SINGLE_QUOTES = "\u2018\u2019\u201a\u201b\u02bc\u00b4`"
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f\u00ab\u00bb"
_CHARACTERS = str.maketrans({**dict.fromkeys(_SINGLE_QUOTES, "'"), **dict.fromkeys(_DOUBLE_QUOTES, '"'), "*": None})


def normalise(text: str) -> str:
    """Lower case, plain quotes, no asterisks (emphasis inside a phrase), single spaces."""
    return " ".join(text.lower().translate(_CHARACTERS).split())


class Markers:
    """Substrings that give the behaviour away. Raises SettingsError if there are none."""

    def __init__(self, markers: Iterable[str], empty_counts: bool = True):
        self.phrases = tuple(filter(None, dict.fromkeys(map(normalise, markers))))
        self._empty_counts = empty_counts
        if not self.phrases:
            raise SettingsError(
                "scoring.markers is empty: list phrases that show the behaviour, or choose a behaviour preset"
            )

    def seen_in(self, text: str) -> bool:
        text = normalise(text)
        return any(marker in text for marker in self.phrases)

    def shown_by(self, answer: str) -> bool:
        """Verdict on a whole answer, which may be empty."""
        return self.seen_in(answer) if answer.strip() else self._empty_counts
