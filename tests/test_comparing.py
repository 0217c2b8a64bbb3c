"""Paired comparisons, against what statistics gives for them, and how a run's figures are put into words."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from bruno_ray.intervals import mcnemar, mean_difference
from bruno_ray.publishing.comparing import by_category, comparison_lines, comparisons, delayed, flips, optimism
from bruno_ray.runs.records import RunnerUpRecord, RunRecord, ScoresRecord, SelectedRecord, TestPrompt
from bruno_ray.settings import Settings

N = 20


def rate(cases: int, metric: str = "behaviour_rate", of: int = N) -> ScoresRecord:
    rows = (1.0,) * cases + (0.0,) * (of - cases)
    return ScoresRecord(values={metric: cases / of}, counts={metric: (cases, of)}, rows={metric: rows})


def both(first: ScoresRecord, second: ScoresRecord) -> ScoresRecord:
    merged = {name: getattr(first, name) | getattr(second, name) for name in ("values", "counts", "rows")}
    return ScoresRecord(**merged)


def kl(values: list[float]) -> ScoresRecord:
    return ScoresRecord(values={"kl_divergence": float(np.mean(values))}, rows={"kl_divergence": tuple(values)})


def record(test: ScoresRecord, unedited: ScoresRecord, runner_up: ScoresRecord | None = None) -> RunRecord:
    second = RunnerUpRecord(number=4, edit={}, test=runner_up) if runner_up else None
    selected = SelectedRecord(number=3, edit={}, validation=rate(1), test=test, runner_up=second)
    return RunRecord(settings=Settings(), baseline={"test": unedited}, selected=selected)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    # 2 * P(X <= smaller) for X ~ B(n, 1/2), at most 1.
    [(0, 0, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024), (5, 5, 1.0), (6, 0, 2 / 64)],
)
def test_mcnemar_counts_only_where_the_two_differ(only_first: int, only_second: int, p: float) -> None:
    first = [1] * only_first + [0] * only_second + [1] * 30 + [0] * 30
    second = [0] * only_first + [1] * only_second + [1] * 30 + [0] * 30
    assert mcnemar(first, second) == (only_first, only_second, pytest.approx(p))


def test_the_interval_of_a_difference_is_that_of_another_bootstrap() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.exponential(1.0, 80), generator.exponential(0.5, 80)
    mean, low, high = mean_difference(first, second)
    theirs = bootstrap((first - second,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    assert mean == pytest.approx((first - second).mean())
    assert low == pytest.approx(theirs.low, abs=0.02) and high == pytest.approx(theirs.high, abs=0.02)
    assert mean_difference(first, second) == (mean, low, high), "seeded"


def test_what_chance_explains_is_said_to_be_the_same() -> None:
    found = comparisons(record(both(rate(1), kl([0.01] * N)), rate(18), both(rate(2), kl([0.02, 0.03] * (N // 2)))))
    assert [(c.metric, c.other, c.differs) for c in found] == [
        ("behaviour_rate", "the unedited model", True),
        ("behaviour_rate", "trial 4, the runner-up", False),
        ("kl_divergence", "trial 4, the runner-up", True),
    ]
    assert "1 against 18 of 20; 0 only here, 17 only there" in found[0].text
    lines = comparison_lines(record(rate(1), rate(18), rate(2)))
    assert lines[1].endswith("they cannot be told apart") and "told apart" not in lines[0]


def test_nothing_is_compared_before_the_test() -> None:
    untested = RunRecord(settings=Settings(), selected=SelectedRecord(number=1, edit={}, validation=rate(1)))
    assert comparisons(untested) == [] and flips(untested, []) == {} and optimism(untested) == ""


def test_the_optimism_gap_compares_the_same_length() -> None:
    test = both(rate(8), rate(3, "behaviour_rate_30"))
    assert "1/20 in the search, 3/20 on test prompts (optimism gap +10.0 points)" in optimism(record(test, rate(18)))


def test_behaviour_that_comes_late_is_flagged() -> None:
    late = record(both(rate(12), rate(2, "behaviour_rate_30")), rate(18))
    assert "2/20 within the 30 tokens that the search reads, 12/20 within 256" in delayed(late)
    assert delayed(record(both(rate(3), rate(2, "behaviour_rate_30")), rate(18))) == ""


def test_flips_go_in_both_directions_and_categories_have_their_rates() -> None:
    before = ScoresRecord(values={}, rows={"behaviour_rate": (1, 1, 0, 0), "baseline_behaviour_rate": (0, 0)})
    after = ScoresRecord(values={}, rows={"behaviour_rate": (0, 1, 1, 0), "baseline_behaviour_rate": (1, 0)})
    prompts = [TestPrompt(side="target", prompt=text, category=text[0]) for text in ("a1", "a2", "b1", "b2")]
    prompts += [TestPrompt(side="baseline", prompt=text) for text in ("x", "y")]
    assert flips(record(after, before), prompts) == {
        "target lost": ["a1"],
        "target kept": ["a2"],
        "target gained": ["b1"],
        "baseline gained": ["x"],
    }
    categories = by_category(record(after, before), prompts)
    assert [(name, cell.split(" =")[0]) for name, _, cell in categories] == [("a", "1/2"), ("b", "1/2")]
    assert by_category(record(after, before), [p.model_copy(update={"category": None}) for p in prompts]) == []
