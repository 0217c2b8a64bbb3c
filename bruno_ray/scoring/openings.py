"""How compliant answers begin, read off the unedited model's answers to baseline prompts."""

from collections import Counter
from collections.abc import Sequence

from bruno_ray.scoring.base import Evaluation

MOST_TOKENS = 3
GOES_ON = 0.5
"""An opening grows while this share of the answers that begin with it go on in the same way."""
COMMON = 0.1
"""Share of all answers that makes an opening common. A rarer one is about its prompt, such as its subject."""


def compliant_opening(unedited: Evaluation) -> tuple[int, ...]:
    """The opening that the settings give, or the most common one of the baseline answers.

    That is the most common first token, made longer (up to MOST_TOKENS) as long as at least half of the answers
    that begin so go on in the same way.
    """
    given = _given_opening(unedited)
    if given:
        return given
    answers = _baseline_answers(unedited)
    opening: tuple[int, ...] = ()
    while answers and len(opening) < MOST_TOKENS:
        n = len(opening)
        counts = Counter(answer[n] for answer in answers if len(answer) > n)
        if not counts:
            break
        token, count = counts.most_common(1)[0]
        if opening and count < GOES_ON * len(answers):
            break
        opening += (token,)
        answers = [answer for answer in answers if answer[: n + 1] == opening]
    return opening


def common_openings(unedited: Evaluation, most: int) -> list[tuple[int, ...]]:
    """Up to ``most`` openings of one to MOST_TOKENS tokens, the commonest first; or the one the settings give."""
    given = _given_opening(unedited)
    if given:
        return [given]
    answers = _baseline_answers(unedited)
    counts = Counter(answer[:n] for answer in answers for n in range(1, MOST_TOKENS + 1) if len(answer) > n)
    common = {opening: count for opening, count in counts.items() if count >= COMMON * len(answers)}
    # A prefix that is always continued in one way is left to its longer version.
    whole = [
        opening
        for opening, count in common.items()
        if not any(len(o) == len(opening) + 1 and o[:-1] == opening and c == count for o, c in common.items())
    ]
    return sorted(whole, key=lambda opening: (-counts[opening], opening))[:most]


def _given_opening(unedited: Evaluation) -> tuple[int, ...]:
    text = unedited.settings.compliant_opening
    return tuple(unedited.engine.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def _baseline_answers(unedited: Evaluation) -> Sequence[tuple[int, ...]]:
    """Tokens of the baseline answers that do not show the behaviour."""
    return [
        answer.token_ids
        for answer in unedited.baseline_answers[0]
        if answer.token_ids and not unedited.markers.shown_by(answer.text)
    ]
