"""A worker from settings to scores, without Ray."""

import datetime
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.errors import ModelError
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.settings import ModelSettings, ResidualSettings, ScoringSettings
from bruno_ray.workers.exchanged import EvaluationContext
from bruno_ray.workers.model_worker import ModelWorker
from tests.support import tiny_models

TARGET = tuple(map(Prompt, ["red?", "blue?", "dark green?"]))
BASELINE = tuple(map(Prompt, ["one", "two and three", "four", "five"]))
DATE = datetime.date(2024, 2, 29)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> ModelWorker:
    folder: Path = tiny_models.write(tmp_path_factory.mktemp("model"), "qwen3")
    return ModelWorker(ModelSettings(id=str(folder), dtypes=("float32",)), threads=1)


@pytest.fixture(scope="module")
def context(worker: ModelWorker) -> EvaluationContext:
    info = worker.describe()
    directions = np.random.default_rng(0).normal(size=(info.n_layers + 1, 1, info.d_model)).astype(np.float32)
    bank = {"random": directions / np.linalg.norm(directions, axis=-1, keepdims=True)}
    bank["broken"] = np.full_like(directions, np.nan)
    scoring = ScoringSettings(markers=("e", "t"), response_tokens=8)
    return EvaluationContext("first", bank, TARGET, BASELINE, "", scoring, DATE)


def edit(strength: float, directions: str = "random") -> Edit:
    kernel = AblationParameters(strength, 1.0, 0.5, 3.0)
    return Edit({"attention": kernel, "mlp": kernel}, directions, None, "full")


def test_describe(worker: ModelWorker) -> None:
    info = worker.describe()
    assert (info.family, info.n_layers, info.d_model) == ("qwen3", tiny_models.LAYERS, tiny_models.HIDDEN)
    assert info.components == ("attention", "mlp")
    assert info.n_parameters == sum(p.numel() for p in worker.loaded.model.parameters())
    assert any(row.reached for row in info.coverage)
    assert pickle.loads(pickle.dumps(info)) == info


def test_a_batch_of_edits_scores_as_each_alone(worker: ModelWorker, context: EvaluationContext) -> None:
    edits = [edit(0.3), edit(1.0), edit(1.5)]
    together = worker.evaluate(context, edits)
    for one, outcome in zip(edits, together):
        (alone,) = worker.evaluate(context, [one])
        assert outcome.error is None
        assert outcome.scores.values == pytest.approx(alone.scores.values, rel=1e-4, abs=1e-9)
        assert outcome.scores.counts == alone.scores.counts
        assert outcome.samples == alone.samples and len(outcome.samples) == len(TARGET)
        assert outcome.seconds > 0 and outcome.tokens > 0
        assert asdict(pickle.loads(pickle.dumps(outcome))) == asdict(outcome)
    values = [outcome.scores.values["kl_divergence"] for outcome in together]
    assert len(set(values)) == 3 and min(values) > 0


def test_no_trial_leaks_into_the_next(worker: ModelWorker, context: EvaluationContext) -> None:
    before = worker.baseline(context)
    weights = {name: value.clone() for name, value in worker.loaded.model.state_dict().items()}
    worker.evaluate(context, [edit(1.5)])
    fresh = worker.baseline(replace(context, key="the same again"))
    assert before == fresh
    assert before.values["kl_divergence"] == pytest.approx(0, abs=1e-9)
    for name, value in worker.loaded.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_nan_directions_fail_their_own_trial_only(worker: ModelWorker, context: EvaluationContext) -> None:
    good, broken = worker.evaluate(context, [edit(1.0), edit(1.0, "broken")])
    (alone,) = worker.evaluate(context, [edit(1.0)])
    assert broken.scores is None and "not numbers" in broken.error
    assert good.scores.values == pytest.approx(alone.scores.values, rel=1e-4)
    (only,) = worker.evaluate(context, [edit(1.0, "broken")])
    assert only.scores is None


def test_another_context_is_another_study(worker: ModelWorker, context: EvaluationContext) -> None:
    """Same name of a direction set, other directions: nothing remembered of the first may be used."""
    (first,) = worker.evaluate(context, [edit(1.0)])
    other = replace(context, key="second", bank={"random": np.roll(context.bank["random"], 1, axis=-1)})
    (second,) = worker.evaluate(other, [edit(1.0)])
    assert first.scores.values != second.scores.values
    (again,) = worker.evaluate(context, [edit(1.0)])
    assert again.scores.values == pytest.approx(first.scores.values, rel=1e-4)


def test_answers_with_and_without_edits(worker: ModelWorker, context: EvaluationContext) -> None:
    plain, edited, plain_again = worker.answers(context, TARGET, [None, edit(1.5), None], 8)
    assert plain == plain_again != edited
    assert [len(answers) for answers in (plain, edited)] == [3, 3]


def test_a_model_as_judge_gives_its_likeliest_first_tokens(worker: ModelWorker) -> None:
    found = worker.first_tokens(TARGET, DATE, 5)
    assert [len(top) for top in found] == [5, 5, 5]
    ids = render(worker.loaded.tokenizer, TARGET, date=DATE)
    (logits_PV,) = worker.engine.next_logits(ids, [None])
    for top, logits_V in zip(found, logits_PV):
        best = logits_V.softmax(-1).argmax()
        assert top[0][0] == worker.loaded.tokenizer.decode([int(best)], skip_special_tokens=True)
        assert math.exp(top[0][1]) == pytest.approx(float(logits_V.softmax(-1)[best]), rel=1e-5)
        assert [logprob for _, logprob in top] == sorted((logprob for _, logprob in top), reverse=True)


def test_own_answers_need_no_markers(worker: ModelWorker, context: EvaluationContext) -> None:
    (plain,) = worker.answers(context, TARGET, [None], 8)
    own = worker.own_answers(TARGET, "", DATE, 8)
    ids = render(worker.loaded.tokenizer, TARGET, date=DATE)
    (responses,) = worker.engine.generate(ids, [None], 8)
    assert [text for text, _ in own] == plain and [ended for _, ended in own] == [each.ended for each in responses]


def test_whole_answers_come_with_scores_where_they_are_asked_for(
    worker: ModelWorker, context: EvaluationContext
) -> None:
    reading = replace(context, key="reading", readings=True)
    plain, edited = worker.answers(context, TARGET, [None, edit(1.5)], 8)
    unedited, (outcome,) = worker.baseline(reading), worker.evaluate(reading, [edit(1.5)])
    assert unedited.answers == tuple((prompt.user, answer) for prompt, answer in zip(TARGET, plain))
    assert outcome.scores.answers == tuple((prompt.user, answer) for prompt, answer in zip(TARGET, edited))
    shown, total = outcome.scores.counts["behaviour_rate"]
    assert sum(outcome.scores.verdicts["markers"]) == shown and total == len(TARGET)
    assert worker.baseline(context).answers == ()


def test_the_response_prefix_is_part_of_every_prompt(worker: ModelWorker, context: EvaluationContext) -> None:
    prefixed = replace(context, key="prefixed", response_prefix="Well,")
    assert worker.answers(prefixed, TARGET, [None], 8) != worker.answers(context, TARGET, [None], 8)
    assert worker.baseline(prefixed).values.keys() == worker.baseline(context).values.keys()


def test_residuals(worker: ModelWorker) -> None:
    found = worker.residuals(TARGET, "", DATE, ResidualSettings(answer_tokens=2))
    assert found.shape == (3, 3, tiny_models.LAYERS + 1, tiny_models.HIDDEN)
    assert found.dtype == np.float32 and np.isfinite(found).all()


def test_memory_is_counted(worker: ModelWorker) -> None:
    assert worker.memory()["memory"] > 2**20


def test_a_missing_model_is_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        ModelWorker(ModelSettings(id="no/such-model"))
    assert "\n" not in str(caught.value)
