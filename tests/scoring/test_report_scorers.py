"""Scorers of what is reported: length, baseline prompts, neutral text. Values worked out by hand on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch

from bruno_ray.errors import SettingsError
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.behaviour_by_length import LENGTHS
from bruno_ray.scoring.neutral_text import PASSAGE_TOKENS, passages
from bruno_ray.scoring.registry import SCORERS, make_scorers
from bruno_ray.settings import ScoringSettings
from bruno_ray.settings.sources import load
from tests.scoring.helpers import response, settings


def test_a_delayed_behaviour_shows_at_the_length_at_which_it_appears(
    engine: BatchEngine,
    prompts: ScoringPrompts,
) -> None:
    given = settings(markers=("sorry",), response_tokens=160)
    evaluation = Evaluation(engine, prompts, given)
    texts = ("sorry, no", "x" * 60 + "sorry", "y" * 150, "")
    ids = [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    evaluation.target_answers = [[replace(response(text), token_ids=tuple(row)) for text, row in zip(texts, ids)]]
    (scores,) = SCORERS["behaviour_by_length"](given).score(evaluation)
    # One token is one byte. The empty answer counts, as in the behaviour rate; 256 tokens were not generated.
    assert scores.counts == {
        "behaviour_rate_30": (2, 4),
        "behaviour_rate_50": (2, 4),
        "behaviour_rate_100": (3, 4),
        "behaviour_rate_150": (3, 4),
    }
    assert scores.values["behaviour_rate_100"] == 0.75


def test_baseline_behaviour_reads_baseline_answers(engine: BatchEngine, prompts: ScoringPrompts) -> None:
    given = settings(markers=("sorry",))
    evaluation = Evaluation(engine, prompts, given, [None, None])
    evaluation.baseline_answers = [[response("fine"), response("I am Sorry")], [response("a"), response("b")]]
    first, second = SCORERS["baseline_behaviour"](given).score(evaluation)
    assert first.counts == {"baseline_behaviour_rate": (1, 2)} and first.values == {"baseline_behaviour_rate": 0.5}
    assert second.counts == {"baseline_behaviour_rate": (0, 2)}


def test_neutral_text_is_what_single_passages_lose_and_gain(
    engine: BatchEngine,
    prompts: ScoringPrompts,
    edits: list,
) -> None:
    given = settings()
    scorer = SCORERS["neutral_text"](given)
    scorer.prepare(Evaluation(engine, prompts, given))
    unedited, strong = scorer.score(Evaluation(engine, prompts, given, [None, edits[0]]))
    assert unedited.values == pytest.approx({"neutral_lost": 0, "neutral_gained": 0}, abs=1e-5)

    lost = gained = n = 0.0
    for text in passages():
        ids = engine.tokenizer(text)["input_ids"][:PASSAGE_TOKENS]
        for i in (1, len(ids) // 2, len(ids) - 1):  # all tokens one by one would take minutes
            before, after = engine.next_logits([ids[:i]], [None, edits[0]]).double().log_softmax(-1)[:, 0, ids[i]]
            change = float(after - before)
            lost, gained, n = lost + max(0.0, -change), gained + max(0.0, change), n + 1
    assert strong.values["neutral_lost"] > 0.01
    # A sample of the tokens: equal up to its error.
    assert strong.values["neutral_lost"] == pytest.approx(lost / n, rel=0.35)
    assert strong.values["neutral_gained"] == pytest.approx(gained / n, rel=0.35)


def test_every_token_of_a_passage_counts_once(
    engine: BatchEngine,
    prompts: ScoringPrompts,
    edits: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ("a short one", "and a somewhat longer second passage")
    monkeypatch.setattr("bruno_ray.scoring.neutral_text.passages", lambda: texts)
    given = settings()
    scorer = SCORERS["neutral_text"](given)
    scorer.prepare(Evaluation(engine, prompts, given))
    (strong,) = scorer.score(Evaluation(engine, prompts, given, [edits[0]]))
    changes = []
    for text in texts:
        ids = engine.tokenizer(text)["input_ids"]
        sequences = [ids[:i] for i in range(1, len(ids))]
        before, after = engine.next_logits(sequences, [None, edits[0]]).double().log_softmax(-1)
        changes += [float(after[i, token] - before[i, token]) for i, token in enumerate(ids[1:])]
    change_T = torch.tensor(changes)
    assert strong.values["neutral_lost"] == pytest.approx(float((-change_T).clamp(min=0).mean()), rel=1e-3)
    assert strong.values["neutral_gained"] == pytest.approx(float(change_T.clamp(min=0).mean()), rel=1e-3)


def test_the_passages_are_of_several_genres_and_long_enough() -> None:
    assert len(passages()) >= 40 and len(set(passages())) == len(passages())
    assert all(30 <= len(text.split()) <= 120 or "\n" in text for text in passages())
    assert sum("def " in text or "function" in text or "SELECT" in text for text in passages()) >= 3


def test_what_is_reported_is_measured_with_longer_answers_and_more_scorers() -> None:
    search = ScoringSettings(markers=("sorry",), response_tokens=30)
    report = search.for_report()
    assert report.response_tokens == 256 == LENGTHS[-1]
    assert set(search.scorers) - {"elicited_answers"} < set(report.scorers) and len(set(report.scorers)) == len(
        report.scorers
    )
    assert report.markers == search.markers and report.objectives == search.objectives
    metrics = [metric for scorer in make_scorers(report) for metric in scorer.metrics]
    assert len(set(metrics)) == len(metrics)


def test_a_report_shorter_than_the_search_is_refused_in_one_line() -> None:
    with pytest.raises(SettingsError, match=r"report_tokens is 20 .*search reads 30.*raise scoring.report_tokens"):
        load(["--model.id=m", "--scoring.response-tokens=30", "--scoring.report-tokens=20"], environ={})


def test_logprobs_of_neutral_text_are_finite_under_a_mild_edit(
    engine: BatchEngine,
    prompts: ScoringPrompts,
    edits: list,
) -> None:
    given = settings()
    scorer = SCORERS["neutral_text"](given)
    scorer.prepare(Evaluation(engine, prompts, given))
    for scores in scorer.score(Evaluation(engine, prompts, given, edits)):
        assert all(math.isfinite(value) and value >= 0 for value in scores.values.values())
