"""Edits that are left half-way, on a real (tiny) model: what is answered to the end is scored as ever."""

import pytest
import torch

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.scoring.base import Evaluation, score_edits
from bruno_ray.scoring.racing import race
from bruno_ray.scoring.registry import make_scorers
from bruno_ray.settings import ScoringSettings

SETTINGS = ScoringSettings(
    scorers=("behaviour_rate", "kl_divergence", "coherence"),
    markers=tuple("abcdefghijklmnopqrstuvw"),
    response_tokens=6,
)


@pytest.fixture(scope="module")
def several(engine):
    shape = (engine.loaded.architecture.n_layers + 1, 1, engine.loaded.architecture.d_model)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    bank = {"random": directions / directions.norm(dim=-1, keepdim=True)}
    kernels = [AblationParameters(strength, 1.0, 1.0, 5.0) for strength in (0.2, 0.6, 1.0, 1.4)]
    return engine.editor.resolve_all([Edit({"mlp": kernel}, "random", None, "none") for kernel in kernels], bank)


@pytest.fixture(scope="module")
def scorers(engine, many_prompts):
    made = make_scorers(SETTINGS)
    for scorer in made:
        scorer.prepare(Evaluation(engine, many_prompts, SETTINGS))
    return made


@pytest.fixture(scope="module")
def whole(engine, many_prompts, several, scorers):
    _, found = score_edits(engine, scorers, many_prompts, SETTINGS, several)
    return found


def test_without_a_rival_that_dominates_scores_are_those_of_the_whole_evaluation(
    engine, many_prompts, several, scorers, whole
):
    found = race(engine, scorers, many_prompts, SETTINGS, several, rivals=[(1.0, -1.0), (2.0, 0.0)])
    assert found.finished == [0, 1, 2, 3] and not found.pruned
    for k, scores in found.scores(scorers, readings=False).items():
        assert scores.counts == whole[k].counts and scores.values == pytest.approx(whole[k].values, rel=1e-4)


def test_an_edit_is_left_as_soon_as_its_answers_so_far_are_too_many_and_the_others_are_not_touched(
    engine, many_prompts, several, scorers, whole
):
    rates = [scores.values["behaviour_rate"] for scores in whole]
    kls = [scores.values["kl_divergence"] for scores in whole]
    assert min(rates) > 0.3 and kls == sorted(kls), "the markers are common letters; a stronger edit moves more"
    rival = (0.15, (kls[1] + kls[2]) / 2)  # dominates the two stronger edits, and those alone
    tokens = engine.tokens
    found = race(engine, scorers, many_prompts, SETTINGS, several, [rival])
    spent, tokens = engine.tokens - tokens, engine.tokens
    assert found.finished == [0, 1] and set(found.pruned) == {2, 3}
    for scores in found.pruned.values():
        marked, asked = scores.counts["behaviour_rate"]
        assert asked in (10, 20, 30) and marked / 40 >= 0.15, "blocks of ten; what is certain is enough"
    for k, scores in found.scores(scorers, readings=False).items():
        assert scores.counts == whole[k].counts and scores.values == pytest.approx(whole[k].values, rel=1e-4)
    race(engine, scorers, many_prompts, SETTINGS, several, [rival], spared=[2, 3])
    assert engine.tokens - tokens > spent


def test_what_a_rival_without_any_behaviour_dominates_is_not_asked_at_all(
    engine, many_prompts, several, scorers, whole
):
    found = race(engine, scorers, many_prompts, SETTINGS, several, [(0.0, 0.0)])
    assert not found.finished and found.scores(scorers, False) == {}
    assert {scores.counts["behaviour_rate"] for scores in found.pruned.values()} == {(0, 0)}
    assert found.pruned[3].values["kl_divergence"] == pytest.approx(whole[3].values["kl_divergence"], rel=1e-4)
