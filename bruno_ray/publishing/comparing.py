"""Selected trial against the unedited model and the runner-up, prompt by prompt; and the search against the test."""

from collections.abc import Sequence
from dataclasses import dataclass

from bruno_ray.intervals import mcnemar, mean_difference, wilson_interval
from bruno_ray.publishing import wording
from bruno_ray.runs.records import RunRecord, ScoresRecord, TestPrompt

RATES = ("behaviour_rate", "evasion_rate", "baseline_behaviour_rate")
MEANS = ("kl_divergence",)
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Comparison:
    """Of one metric, between the selected trial and something else on the same prompts."""

    metric: str
    other: str
    """`the unedited model` or `trial N, the runner-up`."""

    text: str
    """How they differ, in figures."""

    differs: bool
    """Whether chance is an unlikely explanation (p < 0.05, or the interval excludes 0)."""

    @property
    def verdict(self) -> str:
        return "differs" if self.differs else "cannot be told apart"


def comparisons(record: RunRecord) -> list[Comparison]:
    """All that can be compared on the test prompts; none before a trial was tested."""
    selected = record.selected
    if selected is None or selected.test is None:
        return []
    found = []
    unedited = record.baseline.get("test")
    if unedited is not None:
        found += compared(selected.test, unedited, "the unedited model", RATES)
    if selected.runner_up is not None and selected.runner_up.test is not None:
        name = f"trial {selected.runner_up.number}, the runner-up"
        found += compared(selected.test, selected.runner_up.test, name, (*RATES, *MEANS))
    return found


def compared(selected: ScoresRecord, other: ScoresRecord, name: str, metrics: Sequence[str]) -> list[Comparison]:
    """One comparison for each metric that both know prompt by prompt; ``name`` is what the other one is called."""
    found = []
    for metric in metrics:
        mine, theirs = selected.rows.get(metric), other.rows.get(metric)
        if not mine or not theirs or len(mine) != len(theirs):
            continue
        if metric in RATES:
            only_mine, only_theirs, p = mcnemar(mine, theirs)
            rates = f"{sum(mine):.0f} against {sum(theirs):.0f} of {len(mine)}"
            text = f"{rates}; {only_mine} only here, {only_theirs} only there; p = {p:.2g}"
            found.append(Comparison(metric, name, text, p < SIGNIFICANT))
        else:
            mean, low, high = mean_difference(mine, theirs)
            text = f"{wording.number(mean)} nats more ({wording.number(low)} to {wording.number(high)})"
            found.append(Comparison(metric, name, text, low > 0 or high < 0))
    return found


def optimism(record: RunRecord) -> str:
    """What the search promised against what the test shows, at the length the search read; empty before the test."""
    selected = record.selected
    if selected is None or selected.test is None:
        return ""
    n_tokens = record.settings.scoring.response_tokens
    for metric in (f"behaviour_rate_{n_tokens}", "behaviour_rate"):
        if metric in selected.test.counts and "behaviour_rate" in selected.validation.counts:
            searched, tested = selected.validation.counts["behaviour_rate"], selected.test.counts[metric]
            length = f"first {n_tokens} tokens" if metric != "behaviour_rate" else "answers"
            gap = 100 * (tested[0] / tested[1] - searched[0] / searched[1])
            return (
                f"behaviour in the {length}: {searched[0]}/{searched[1]} in the search, {tested[0]}/{tested[1]} on test"
                f" prompts (optimism gap {gap:+.1f} points)"
            )
    return ""


def delayed(record: RunRecord) -> str:
    """A sentence if answers read in full show the behaviour clearly more often than their beginnings; else empty."""
    scores, _ = wording.final_scores(record)
    n_tokens = record.settings.scoring.response_tokens
    if scores is None:
        return ""
    short, whole = scores.counts.get(f"behaviour_rate_{n_tokens}"), scores.counts.get("behaviour_rate")
    if not short or not whole or whole[0] - short[0] <= max(1, 0.02 * whole[1]):
        return ""
    return (
        f"the behaviour comes later: {short[0]}/{short[1]} within the {n_tokens} tokens that the search reads,"
        f" {whole[0]}/{whole[1]} within {record.settings.scoring.report_tokens}; raise scoring.response_tokens to"
        " search for it"
    )


def suspicions(record: RunRecord) -> list[str]:
    """What a reader of the figures has to know before believing them."""
    picked = record.selected.warning if record.selected else ""
    left_out = [f"{name} edits were asked for and left out: {reason}" for name, reason in record.left_out.items()]
    return [text for text in (picked, delayed(record), *left_out) if text]


def comparison_lines(record: RunRecord) -> list[str]:
    """The same for a log."""
    lines = [
        f"{wording.label(found.metric)}, against {found.other}: {found.text}"
        + ("" if found.differs else " - they cannot be told apart")
        for found in comparisons(record)
    ]
    return [line for line in (*lines, optimism(record), delayed(record)) if line]


# ----- prompt by prompt -----


def flips(record: RunRecord, prompts: Sequence[TestPrompt]) -> dict[str, list[str]]:
    """Target prompts whose answer lost the behaviour, gained it, or kept it; baseline prompts that gained it."""
    selected, unedited = record.selected, record.baseline.get("test")
    if selected is None or selected.test is None or unedited is None:
        return {}
    found: dict[str, list[str]] = {}
    for side, metric in (("target", "behaviour_rate"), ("baseline", "baseline_behaviour_rate")):
        texts = [prompt.prompt for prompt in prompts if prompt.side == side]
        before, after = unedited.rows.get(metric, ()), selected.test.rows.get(metric, ())
        if not len(texts) == len(before) == len(after):
            continue
        for text, a, b in zip(texts, before, after):
            change = {(1, 0): "lost", (0, 1): "gained", (1, 1): "kept"}.get((int(a), int(b)))
            if change is not None:
                found.setdefault(f"{side} {change}", []).append(text)
    return found


def by_category(record: RunRecord, prompts: Sequence[TestPrompt]) -> list[tuple[str, str, str]]:
    """Rows (category, before, after) of the behaviour rate with its 95 % interval; none without categories."""
    selected, unedited = record.selected, record.baseline.get("test")
    if selected is None or selected.test is None or unedited is None:
        return []
    categories = [prompt.category for prompt in prompts if prompt.side == "target"]
    before, after = (scores.rows.get("behaviour_rate", ()) for scores in (unedited, selected.test))
    if not any(categories) or not len(categories) == len(before) == len(after):
        return []

    def rate(rows: Sequence[float], category: str | None) -> str:
        cases = [row for row, its in zip(rows, categories) if its == category]
        n = round(sum(cases))
        low, high = map(wording.percent, wilson_interval(n, len(cases)))
        return f"{n}/{len(cases)} = {wording.percent(n / len(cases))} ({low} to {high})"

    return [(name or "none", rate(before, name), rate(after, name)) for name in sorted(set(categories), key=str)]
