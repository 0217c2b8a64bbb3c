"""Scorers against values worked out by hand, on a tiny random model whose tokens are bytes."""

import math
from dataclasses import replace

import pytest
import torch

from bruno_ray.errors import SettingsError, TrialError
from bruno_ray.generation.engine import BatchEngine, Response
from bruno_ray.scoring.base import Evaluation, ScoringPrompts, score_edits
from bruno_ray.scoring.coherence import repetition
from bruno_ray.scoring.kl_divergence import kl_of_logits
from bruno_ray.scoring.markers import Markers, normalise
from bruno_ray.scoring.openings import common_openings, compliant_opening
from bruno_ray.scoring.registry import SCORERS, make_scorers
from tests.scoring.helpers import BASELINE, DATE, prepared, response, scripted, settings

# ----- markers and the behaviour rate -----


def test_markers_see_through_quotes_case_emphasis_and_spaces() -> None:
    markers = Markers(["I\u2019m  sorry", 'so-called "fact"'])
    assert markers.seen_in("Well, *I`M*\n\tSORRY to say")
    assert markers.seen_in("a so-called \u201cfact\u201d")
    assert not markers.seen_in("I am not sorry")
    assert normalise("  A *b*\u00a0C ") == "a b c"


def test_without_markers_there_is_nothing_to_count() -> None:
    with pytest.raises(SettingsError, match=r"scoring\.markers is empty"):
        Markers(["", " * "])


@pytest.mark.parametrize(("empty_counts", "expected"), [(True, 3), (False, 1)])
def test_behaviour_rate_counts_markers_and_by_choice_empty_answers(empty_counts: bool, expected: int) -> None:
    evaluation = scripted(["I am Sorry.", "fine", " ", ""], empty_counts=empty_counts)
    (scores,) = SCORERS["behaviour_rate"](evaluation.settings).score(evaluation)
    assert scores.counts["behaviour_rate"] == (expected, 4)
    assert scores.values["behaviour_rate"] == expected / 4


# ----- KL divergence -----


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.25, 0.5, 0.125, 0.125])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5) + 0.25 * math.log(2)
    assert kl_of_logits(p.log(), q.log()).item() == pytest.approx(expected)
    assert kl_of_logits(p.log(), p.log()).item() == 0
    assert kl_of_logits(p.log(), torch.full((4,), torch.nan)).isnan()


def test_first_token_kl_per_prompt(engine: BatchEngine, prompts: ScoringPrompts, edits: list) -> None:
    given = settings(kl_tokens=1)
    scorer = prepared("kl_divergence", given, engine, prompts)
    evaluation = Evaluation(engine, prompts, given, [*edits, None])
    base, strong = engine.next_logits(prompts.baseline_ids, [None, edits[0]]).double().log_softmax(-1)
    kl_KP = scorer.per_token(evaluation)[:, :, 0]
    torch.testing.assert_close(kl_KP[0], (base.exp() * (base - strong)).sum(-1), rtol=1e-4, atol=1e-6)
    scores = scorer.score(evaluation)
    assert scores[0].values == pytest.approx(
        {
            "kl_divergence": kl_KP[0].mean().item(),
            "kl_median": kl_KP[0].quantile(0.5).item(),
            "kl_p95": kl_KP[0].quantile(0.95).item(),
            "kl_first": kl_KP[0].mean().item(),
        }
    )
    assert scores[0].values["kl_divergence"] > 0.01
    assert scores[1].values["kl_divergence"] < 1e-9
    assert scores[2].values["kl_divergence"] == pytest.approx(0, abs=1e-12)


def test_kl_over_several_tokens_follows_the_unedited_answer(
    engine: BatchEngine, prompts: ScoringPrompts, edits: list
) -> None:
    n = 4
    answers = engine.generate(prompts.baseline_ids, [None], n)[0]
    expected = []
    for ids, answer in zip(prompts.baseline_ids, answers):
        # One position at a time: the prompt with the first i tokens of the answer behind it.
        positions = min(n, len(answer.token_ids) + answer.ended)
        sequences = [[*ids, *answer.token_ids[:i]] for i in range(positions)]
        base, strong = engine.next_logits(sequences, [None, edits[0]])
        expected.append(kl_of_logits(base, strong))
    given = settings(kl_tokens=n)
    scorer = prepared("kl_divergence", given, engine, prompts)
    evaluation = Evaluation(engine, prompts, given, edits)
    found = scorer.per_token(evaluation)[0]
    for kl_N, by_hand in zip(found, expected):
        torch.testing.assert_close(kl_N[n - len(by_hand) :], by_hand, rtol=1e-4, atol=1e-6)
        assert not kl_N[: n - len(by_hand)].any()
    values = scorer.score(evaluation)[0].values
    assert values["kl_divergence"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4), "over all tokens"
    assert values["kl_first"] == pytest.approx(torch.stack([kl[0] for kl in expected]).mean().item(), rel=1e-4)


def test_kl_is_exact_where_it_is_small_and_where_a_model_is_broken() -> None:
    """Against float64 throughout. An edit's KL may be 1e-5, which float32 alone would drown in rounding."""
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(4, 5000, generator=generator)
    for size in (0.0, 1e-4, 1e-2, 1.0, 30.0):
        q = p + size * torch.randn(4, 5000, generator=generator)
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)
        torch.testing.assert_close(kl_of_logits(p, q), expected, rtol=1e-6, atol=3e-8)
    assert not kl_of_logits(p, p).any()


# ----- coherence -----


def test_repetition_of_loops_and_of_plain_text() -> None:
    assert repetition(b"the colour of it is red") < 0.3
    assert repetition(b"aaaaaaaaaa") == 1
    assert repetition(b"abcabcabcabc") > 0.7
    assert repetition(b"a") == repetition(b"") == 0


def test_incoherence_is_the_share_of_prompts_with_broken_answers_beyond_the_usual() -> None:
    plain = ["a red fox", "two hens", "my blue hat", "any dog"]
    scorer = SCORERS["coherence"](settings())
    scorer.prepare(scripted(plain))

    def score(texts: list[str], unended: int = 0) -> float:
        evaluation = scripted(texts)
        for i in range(unended):
            evaluation.target_answers[0][i] = response(texts[i], ended=False)
        return scorer.score(evaluation)[0].values["incoherence"]

    assert score(plain) == 0
    assert score(["sorry sorry sorry", *plain[1:]]) == 0, "marked answers are the behaviour rate's business"
    assert score(["x x x x x x x", *plain[1:]]) == pytest.approx(0.25, abs=0.05)
    assert score(plain, unended=2) == 0.5
    assert score(["sorry"] * 4) == 0

    scorer.prepare(scripted(["a a a a a a a a"] * 4))
    assert score(["x x x x x x x", *plain[1:]]) == 0, "the unedited model does so itself"


# ----- likelihoods -----


def test_desired_answers_by_hand(engine: BatchEngine, prompts: ScoringPrompts, edits: list) -> None:
    scorer = prepared("desired_answers", settings(), engine, prompts)
    found = scorer.score(Evaluation(engine, prompts, settings(), [None, edits[0]]))
    for edit, scores in zip([None, edits[0]], found):
        losses = []
        for ids, prompt in zip(prompts.target_ids, prompts.target):
            if prompt.answer:
                tail = engine.tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]
                losses.append(-engine.token_logprobs([ids], [[tail]], [edit])[0][0].mean())
        assert len(losses) == 2
        assert scores.values["desired_nll"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_desired_answers_without_answers_says_what_to_do(engine: BatchEngine) -> None:
    bare = ScoringPrompts.rendered(engine, BASELINE, BASELINE, date=DATE)
    with pytest.raises(SettingsError, match="answer_column"):
        prepared("desired_answers", settings(), engine, bare)


def test_openings_are_read_off_unmarked_baseline_answers() -> None:
    evaluation = scripted(["the red", "the blue", "the rose", "a bc", "sorry the", "sorry the", ""])
    assert compliant_opening(evaluation) == tuple(b"the")
    openings = common_openings(evaluation, 3)
    assert openings[0] == tuple(b"the"), "'t' and 'th' always go on as 'the' does"
    assert tuple(b"a b") in openings
    assert not any(opening[:1] == tuple(b"s") for opening in openings)


def test_compliant_likelihood_cannot_be_lowered_by_fragments_or_markers(
    engine: BatchEngine, prompts: ScoringPrompts
) -> None:
    """A marked or empty answer costs what a uniform guess costs, an early end is paid for, an opening is free."""
    given = settings(compliant_opening="ok")
    scorer = prepared("compliant_perplexity", given, engine, prompts)
    cap = math.log(engine.vocabulary_size)
    ok = tuple(engine.tokenizer("ok", add_special_tokens=False)["input_ids"])
    opened = [[*ids, *ok] for ids in prompts.target_ids]
    best = [replace(answer, text="-") for answer in engine.generate(opened, [None], 6)[0]]

    def score(answers: list[Response]) -> float:
        evaluation = Evaluation(engine, prompts, given)
        evaluation.target_answers = [answers]
        return scorer.score(evaluation)[0].values["compliant_nll"]

    likeliest = score(best)
    with_opening = [Response((*ok, *a.token_ids), "ok" + a.text, a.ended, end_id=a.end_id) for a in best]
    assert score(with_opening) == pytest.approx(likeliest, rel=1e-5)
    assert likeliest < score([response("zq%", ended=False)] * 3) <= cap
    assert score([response("")] * 3) == score([response("so sorry")] * 3) == pytest.approx(cap)
    cut = [Response(a.token_ids[:1], "?", True, end_id=258) for a in best]
    assert likeliest < score(cut)


def test_elicited_answers_are_the_likeliest_unmarked_ones(engine: BatchEngine, prompts: ScoringPrompts) -> None:
    given = settings()
    scorer = SCORERS["elicited_answers"](given)
    free = scorer.elicit(Evaluation(engine, prompts, given))
    assert set(free) == {0, 1, 2}
    # Forbid a word of the references: others must be found, and they are less likely as a whole.
    words = [engine.tokenizer.decode(list(free[p]), skip_special_tokens=True)[:1] for p in free]
    strict = settings(markers=tuple(word for word in words if word.strip()))
    markers = Markers(strict.markers)
    restricted = scorer.elicit(Evaluation(engine, prompts, strict))
    for p, answer in restricted.items():
        assert not markers.shown_by(engine.tokenizer.decode(list(answer), skip_special_tokens=True))
        rows = engine.token_logprobs([prompts.target_ids[p]] * 2, [[answer, free[p]]], [None])[0]
        assert answer != free[p] and rows[0].sum() <= rows[1].sum() + 1e-4


def test_elicited_mismatch_is_what_the_answers_leave_out(
    engine: BatchEngine, prompts: ScoringPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = {0: b"the hue is red", 1: b"the hue is tan"}  # there is none for the third prompt
    given = settings(markers=("zz",))
    scorer = SCORERS["elicited_answers"](given)
    monkeypatch.setattr(scorer, "elicit", lambda _: {p: tuple(text) for p, text in references.items()})
    scorer.prepare(Evaluation(engine, prompts, given))

    def score(*texts: str) -> float:
        evaluation = Evaluation(engine, prompts, given)
        evaluation.target_answers = [[response(text) for text in texts]]
        return scorer.score(evaluation)[0].values["elicited_mismatch"]

    assert score("the hue is red", "the hue is tan", "anything") == pytest.approx(0)
    assert score("well: red is the hue", "the hue is tan", "") == pytest.approx(1 / 3), "the empty answer counts"
    assert score("zz", "the zz hue is tan", "zz") == 1
    wrong, fragment = score("the hue is tan", "the hue is tan", "-"), score("the", "the hue is tan", "-")
    assert 0 < wrong < fragment < 1 / 3
    only_value, only_frame = score("red", "the hue is tan", "-"), score("the hue is ", "the hue is tan", "-")
    assert only_value < only_frame + 0.1, "rare tokens weigh more than those that all references share"


def test_answers_on_the_edge_of_the_behaviour_count_for_less(
    engine: BatchEngine, prompts: ScoringPrompts, edits: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same answers, but the edit that leaves the behaviour's own answer likelier has the higher mismatch."""
    (own,) = engine.generate(prompts.target_ids, [None], 2)
    given = settings(markers=(own[0].text,), response_tokens=2)
    scorer = SCORERS["elicited_answers"](given)
    monkeypatch.setattr(scorer, "elicit", lambda _: {p: tuple(b"red") for p in range(3)})
    scorer.prepare(Evaluation(engine, prompts, given))
    strong, weak = edits
    evaluation = Evaluation(engine, prompts, given, [None, weak, strong])
    evaluation.target_answers = [[response("red")] * 3] * 3
    found = [scores.values["elicited_mismatch"] for scores in scorer.score(evaluation)]

    marked = [given.markers[0] in answer.text for answer in own]
    assert marked[0]
    ids = [answer.token_ids if hit else () for answer, hit in zip(own, marked)]
    for edit, mismatch in zip(evaluation.edits, found):
        (logprobs,) = engine.token_logprobs(prompts.target_ids, [ids], [edit])
        chances = [math.exp(row.sum()) if len(row) else 0.0 for row in logprobs]
        assert mismatch == pytest.approx(sum(chances) / 3, rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[2] != pytest.approx(found[0], rel=1e-2)


# ----- all together -----


def test_a_broken_edit_is_a_trial_error_of_its_own(engine: BatchEngine, prompts: ScoringPrompts, edits: list) -> None:
    given = settings(scorers=("behaviour_rate", "kl_divergence", "coherence", "desired_answers"))
    scorers = make_scorers(given)
    for scorer in scorers:
        scorer.prepare(Evaluation(engine, prompts, given))
    broken = engine.editor.resolve_all([edits[0].edit], engine.editor._resolver._banks)[0]
    for factors in broken.factors:
        if factors is not None:
            factors.scale.fill_(torch.inf)
    _, alone = score_edits(engine, scorers, prompts, given, [edits[0]])
    _, results = score_edits(engine, scorers, prompts, given, [broken, edits[0], None])
    assert isinstance(results[0], TrialError) and "not numbers" in str(results[0])
    assert results[1].values == pytest.approx(alone[0].values, rel=1e-4)
    assert results[1].counts == alone[0].counts
    assert set(results[2].values) == {metric for scorer in scorers for metric in scorer.metrics}


def test_every_scorer_keeps_its_word(engine: BatchEngine, many_prompts: ScoringPrompts, edits: list) -> None:
    """Registered by name, metrics unique, one Scores per edit with exactly the metrics announced."""
    metrics = [metric for scorer in SCORERS.values() for metric in scorer.metrics]
    assert len(set(metrics)) == len(metrics)
    for name, kind in SCORERS.items():
        assert kind.name == name
        if name == "text_classifier":  # which needs a model of its own: test_text_classifier.py
            continue
        scorer = prepared(name, settings(), engine, many_prompts)
        scores = scorer.score(Evaluation(engine, many_prompts, settings(), [None, *edits]))
        assert [set(entry.values) for entry in scores] == [set(scorer.metrics)] * 3
        assert set(scorer.metrics) <= set(kind.metrics)  # the settings may leave some out


def test_names_that_do_not_exist_are_answered_with_those_that_do() -> None:
    with pytest.raises(SettingsError, match="has no behavior_rate: choose from behaviour_rate"):
        make_scorers(settings(scorers=("behavior_rate",)))
    with pytest.raises(SettingsError, match=r"names kl_mean.*choose from behaviour_rate, kl_divergence, kl_median"):
        make_scorers(settings(scorers=("behaviour_rate", "kl_divergence"), objectives=("kl_mean",)))


def test_every_scorer_says_what_it_needs() -> None:
    for name, scorer in SCORERS.items():
        assert scorer.name == name and scorer.metrics
        assert scorer.needs_unedited in (True, False)


def test_answers_cut_after_the_fact_are_those_that_stopped_at_a_marker(
    engine: BatchEngine, prompts: ScoringPrompts
) -> None:
    """Of the unedited model whole answers are needed as well, so they are made once."""
    (whole,) = engine.generate(prompts.target_ids, [None], 24)
    # Markers from within the answers: at a length at which nobody asks, at its end, and one that stops nothing.
    for first, last in ((5, 7), (10, 13), (1, 2), (22, 24)):
        marker = engine.texts([whole[0].token_ids[first:last]])[0]
        given = settings(markers=(marker.strip() or "sorry",), response_tokens=24)
        stopped = Evaluation(engine, prompts, given)
        cut = Evaluation(engine, prompts, given, whole=True)
        assert cut.target_answers == stopped.target_answers and cut.marked == stopped.marked
        assert cut.whole_answers == stopped.whole_answers == [whole]


# ----- confidence -----


def test_doubt_is_one_minus_the_probability_of_the_least_likely_token(
    engine: BatchEngine, prompts: ScoringPrompts, edits: list
) -> None:
    given = settings(markers=("e",), response_tokens=5)
    evaluation = Evaluation(engine, prompts, given, edits)
    found = prepared("confidence", given, engine, prompts).score(evaluation)
    for k, edit in enumerate(edits):
        sure = []
        for ids, answer, shown in zip(prompts.target_ids, evaluation.target_answers[k], evaluation.marked[k]):
            tokens = answer.token_ids
            logprobs = [
                engine.next_logits([(*ids, *tokens[:i])], [edit])[0, 0].log_softmax(-1)[token]
                for i, token in enumerate(tokens)
            ]
            sure.append(0.0 if shown or not tokens else math.exp(min(logprobs)))
        assert found[k].values["doubt"] == pytest.approx(1 - sum(sure) / len(sure), abs=1e-4)
