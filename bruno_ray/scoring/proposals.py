"""Markers for a behaviour of one's own, proposed from the unedited model's answers to both sides.

The detector says which phrases tell the sides apart. Here each gets the spelling that it has in the answers, and is
counted as a marker would be.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bruno_ray.scoring.detector import RARE, SHORTEST, BehaviourDetector
from bruno_ray.scoring.markers import Markers, normalise

LOOKED_AT = 4
"""Phrases of the detector that are looked at for each one that is proposed."""


@dataclass(frozen=True)
class Proposal:
    """A phrase as a marker."""

    phrase: str
    in_target: int
    """Answers to target prompts that contain it."""

    in_baseline: int
    not_marked: int
    """Of those in target, the ones that no present marker sees."""

    @property
    def covered(self) -> bool:
        return self.not_marked == 0


def propose(
    target: Sequence[tuple[str, str]], baseline: Sequence[tuple[str, str]], present: Sequence[str] = (), most: int = 20
) -> list[Proposal]:
    """At most so many phrases, what tells the sides apart best first.

    Args:
        target, baseline: (prompt, whole answer of the unedited model).
        present: the markers that there are.

    Raises:
        PromptError: as `BehaviourDetector`.
    """
    texts, others = ([normalise(answer) for _, answer in side] for side in (target, baseline))
    marked = [bool(present) and Markers(present).seen_in(text) for text in texts]
    found: dict[str, Proposal] = {}
    for phrase in BehaviourDetector(target, baseline).phrases(LOOKED_AT * most):
        text = spelled(phrase.text, texts)
        hits = [text in answer for answer in texts]
        in_target, in_baseline = sum(hits), sum(text in answer for answer in others)
        rare = in_baseline / len(others) <= RARE * in_target / len(texts)
        if len(text) >= SHORTEST and in_target and rare and text not in found:
            fresh = sum(hit and not seen for hit, seen in zip(hits, marked))
            found[text] = Proposal(text, in_target, in_baseline, fresh)
        if len(found) == most:
            break
    return list(found.values())


def with_proposals(
    present: Sequence[str], proposals: Sequence[Proposal], target: Sequence[tuple[str, str]]
) -> list[str]:
    """The present markers, and of the proposals those that see an answer which nothing before them has seen."""
    chosen = list(present)
    unseen = [normalise(answer) for _, answer in target]
    if present:
        seen_in = Markers(present).seen_in
        unseen = [text for text in unseen if not seen_in(text)]
    for proposal in proposals:
        left = [text for text in unseen if proposal.phrase not in text]
        if len(left) < len(unseen):
            chosen.append(proposal.phrase)
            unseen = left
    return chosen


def spelled(words: str, texts: Sequence[str]) -> str:
    """The detector's words and signs with the spaces that they mostly have in texts: `sorry , but` is `sorry, but`."""
    parts = words.split()
    pattern = re.compile(" ?".join(map(re.escape, parts)))
    spellings = Counter(match[0] for text in texts for match in pattern.finditer(text))
    return spellings.most_common(1)[0][0] if spellings else " ".join(parts)
