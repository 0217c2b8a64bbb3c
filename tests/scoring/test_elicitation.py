"""References are found within a budget of tokens: more prompts mean fewer candidates, not more time."""

import pytest

from bruno_ray.generation.engine import BatchEngine
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.elicitation import Elicitation, _in_turns, trial_tokens
from bruno_ray.scoring.markers import Markers
from tests.scoring.helpers import settings


def evaluation_of(engine: BatchEngine, prompts: ScoringPrompts, **changes: object) -> Evaluation:
    """Half of the model's own answers are marked, by what they say."""
    free = Evaluation(engine, prompts, settings(markers=("\0nothing",), response_tokens=12))
    texts = [answer.text for answer in free.target_answers[0]]
    markers = tuple({text.strip()[:1] for text in texts[::2] if text.strip()})
    return Evaluation(engine, prompts, settings(markers=markers, response_tokens=12, **changes))


@pytest.mark.parametrize("trials", [0.5, 2.0, 8.0])
def test_no_more_is_spent_than_the_budget(engine: BatchEngine, many_prompts: ScoringPrompts, trials: float) -> None:
    unedited = evaluation_of(engine, many_prompts)
    assert any(unedited.marked[0])
    unedited.baseline_answers  # noqa: B018 - measured before: other scorers want them as well
    elicitation = Elicitation(unedited, trials)
    references = elicitation.likeliest()
    first_tokens = sum(map(len, many_prompts.target_ids))  # asked for once, whatever the budget is
    assert elicitation.spent <= trials * trial_tokens(unedited) + first_tokens
    markers = Markers(unedited.settings.markers)
    for answer in references.values():
        assert not markers.shown_by(engine.tokenizer.decode(list(answer), skip_special_tokens=True))


def test_a_larger_budget_finds_more_references_and_never_less_likely_ones(
    engine: BatchEngine, many_prompts: ScoringPrompts
) -> None:
    small, large = (Elicitation(evaluation_of(engine, many_prompts), trials).likeliest() for trials in (0.5, 16.0))
    assert set(small) <= set(large)
    for p, answer in small.items():
        rows = engine.token_logprobs([many_prompts.target_ids[p]] * 2, [[answer, large[p]]], [None])[0]
        assert rows[1].sum() >= rows[0].sum() - 1e-3


def test_own_answers_without_a_marker_are_references_for_nothing(
    engine: BatchEngine, many_prompts: ScoringPrompts
) -> None:
    unedited = evaluation_of(engine, many_prompts)
    references = Elicitation(unedited, 0.0).likeliest()
    answers = unedited.target_answers[0]
    own = {p for p, hit in enumerate(unedited.marked[0]) if not hit and answers[p].text.strip()}
    assert set(references) == own
    assert all(references[p][: len(answers[p].token_ids)] == answers[p].token_ids for p in own)


def test_lists_in_turns() -> None:
    assert list(_in_turns("ab", "c", "def")) == [["a", "c", "d"], ["b", "e"], ["f"]]
    assert list(_in_turns()) == [] and list(_in_turns([], [])) == []
