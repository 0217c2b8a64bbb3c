"""How figures are worded, for the model card and the report alike: metrics, rates with intervals, edits, coverage."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bruno_ray.ablation.edit import OPENED, PART_NAMES
from bruno_ray.ablation.plan import PREFIX
from bruno_ray.intervals import wilson_interval
from bruno_ray.runs.records import RunRecord, ScoresRecord


@dataclass(frozen=True)
class Metric:
    """How a scorer's metric is named to people. Every one is minimised."""

    title: str
    unit: str
    meaning: str
    """One sentence without the title, as in a list of definitions."""


PERCENT = "%"
"""Unit of rates, which are shown as counts with their percentage: a label need not name it."""

METRICS = {
    "behaviour_rate": Metric(
        "Behaviour rate", PERCENT, "target prompts whose answer contains one of the behaviour's markers."
    ),
    "kl_divergence": Metric(
        "KL divergence, mean",
        "nats",
        "how far the edit moves the next-token distribution on baseline prompts, along the unedited model's answers;"
        " mean over the tokens.",
    ),
    "kl_median": Metric("KL divergence, median", "nats", "the same, for the token in the middle."),
    "kl_p95": Metric("KL divergence, 95th percentile", "nats", "the same, exceeded by one token in twenty."),
    "kl_first": Metric(
        "KL divergence, first token", "nats", "the same at the first answer token only, as other tools measure it."
    ),
    "incoherence": Metric(
        "Incoherence of the other answers",
        "share of prompts",
        "repetition and missing ends of answers without a marker, beyond what the unedited model does itself.",
    ),
    "evasion_rate": Metric(
        "Evasion rate",
        PERCENT,
        "target prompts without an answer to the point: answers with the behaviour, answers that read like it, answers"
        " that miss the request, and broken ones.",
    ),
    "compliant_nll": Metric(
        "Answers under the unedited model made to comply",
        "nats per token",
        "how unlikely the answers are to the unedited model after an opening that complies.",
    ),
    "desired_nll": Metric(
        "Desired answers, negative log-likelihood",
        "nats per token",
        "how unlikely the desired answers of the data set are to the edited model.",
    ),
    "elicited_mismatch": Metric(
        "Elicited mismatch",
        "share missed",
        "how much of what the unedited model can be made to say is missing from the answers: 0 nothing, 1 all of it;"
        " an answer that still shows the behaviour counts as 1.",
    ),
    "doubt": Metric(
        "Doubt",
        "1 - probability",
        "how unsure the model is of its answers: 1 minus the mean probability of each answer's least likely token, of"
        " those that most prompts of its form are not answered with; it counts 0 where the behaviour is shown, and less"
        " where prompts that ask nearly the same are answered alike.",
    ),
    **{
        f"behaviour_rate_{n}": Metric(
            f"Behaviour rate within {n} tokens", PERCENT, f"the same answers, read up to {n} tokens."
        )
        for n in (30, 50, 100, 150, 256)
    },
    "baseline_behaviour_rate": Metric(
        "Behaviour rate on baseline prompts",
        PERCENT,
        "baseline prompts, which should not show the behaviour, whose answer contains one of its markers.",
    ),
    "neutral_lost": Metric(
        "Likelihood lost on neutral text",
        "nats per token",
        "how much less likely tokens of unrelated text have become, where they have.",
    ),
    "neutral_gained": Metric(
        "Likelihood gained on neutral text", "nats per token", "how much more likely they have become, where they have."
    ),
    "detected_rate": Metric(
        "Behaviour rate by the detector",
        PERCENT,
        "target prompts whose answer a classifier, trained on the unedited model's answers, takes for the behaviour.",
    ),
    "reasoned_behaviour_rate": Metric(
        "Behaviour rate with reasoning open",
        PERCENT,
        "the behaviour rate of the final answers when the model reasons first, over the answers that get that far.",
    ),
    "unclosed_rate": Metric(
        "Reasoning never closed", PERCENT, "target prompts on which the model is cut off while it still reasons."
    ),
    "reasoned_length": Metric(
        "Length with reasoning open",
        "times the unedited model's",
        "tokens of reasoning and answer, on average over target prompts; 1 is unchanged.",
    ),
    "classified_rate": Metric(
        "Behaviour by the text classifier, mean",
        "probability",
        "how sure a classification model is, on average over target prompts, that the answer shows the behaviour.",
    ),
    "classified_shown": Metric(
        "Behaviour rate by the text classifier", PERCENT, "target prompts of which it is more sure than not."
    ),
    "judged_rate": Metric(
        "Behaviour by the judge, mean",
        "probability",
        "how sure a language model is, on average over target prompts, that the answer shows the behaviour.",
    ),
    "judged_shown": Metric("Behaviour rate by the judge", PERCENT, "target prompts of which it is more sure than not."),
}
"""Metric -> what people are told of it. One that is not here is shown under its own name."""

# An unedited model has no distance from itself.
DISTANCES = ("kl_divergence", "kl_median", "kl_p95", "kl_first", "neutral_lost", "neutral_gained")

NORM_MODES = {
    "none": "plain orthogonalization",
    "pre": "directions measured against row-normalised weights",
    "full": "row-normalised weights, row norms preserved",
}

# What the card says about layers for multi-token prediction, by what became of them.
MTP = {
    "": "",
    "left": "Its layers for multi-token prediction were left as they are: their drafts may be accepted less often.",
    "edited": "Its layers for multi-token prediction were edited like the last layer.",
    "dropped": "The base model's layers for multi-token prediction were left out.",
}


def label(metric: str) -> str:
    """Title and unit."""
    known = METRICS.get(metric)
    if known is None:
        return metric.replace("_", " ").capitalize()
    return known.title if known.unit == PERCENT else f"{known.title} ({known.unit})"


def meanings(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """Rows (title, meaning) of the metrics that are known, each once."""
    return [(METRICS[name].title, METRICS[name].meaning) for name in dict.fromkeys(metrics) if name in METRICS]


def number(value: float) -> str:
    """Four significant digits, no exponent for everyday sizes."""
    if value == 0:
        return "0"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def measured(scores: ScoresRecord | None, metric: str) -> str:
    """`3/100 = 3.0 % (1.0 to 8.5 %)` for a rate, the number for anything else, a dash where there is none."""
    interval = interval_of(scores, metric)
    return count_or_value(scores, metric) + (f" ({interval})" if interval else "")


def count_or_value(scores: ScoresRecord | None, metric: str) -> str:
    if scores is None or metric not in scores.values:
        return "-"
    if metric not in scores.counts:
        return number(scores.values[metric])
    events, total = scores.counts[metric]
    return f"{events}/{total} = {percent(events / total)}" if total else f"{events}/{total}"


def interval_of(scores: ScoresRecord | None, metric: str) -> str:
    """Wilson 95 % interval of a rate; empty for anything else."""
    if scores is None or metric not in scores.intervals:
        return ""
    low, high = scores.intervals[metric]
    return f"{100 * low:.1f} to {percent(high)}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def plain(value: Any) -> str:
    """Any JSON value in one line: numbers short, [45, 48] as 45/48, mappings with their keys."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, int) for part in value):
        return f"{value[0]}/{value[1]}"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {plain(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def before_and_after(before: ScoresRecord | None, after: ScoresRecord | None) -> list[tuple[str, str, str]]:
    """Rows (label, before, after) over every metric of either, objectives' order kept."""
    metrics = dict.fromkeys([*(after.values if after else ()), *(before.values if before else ())])
    rows = []
    for metric in metrics:
        own = before if before and metric in before.values else None
        first = (
            "0 (by definition)" if metric in DISTANCES and not (own and own.values[metric]) else measured(own, metric)
        )
        rows.append((label(metric), first, measured(after, metric)))
    return rows


def final_scores(record: RunRecord) -> tuple[ScoresRecord | None, str]:
    """The scores to report for the selected trial and a phrase for what they were measured on."""
    if record.selected is None:
        return None, "nothing yet"
    if record.selected.saved is not None:
        return record.selected.saved, "test prompts, with the saved weights read back from disk"
    if record.selected.test is not None:
        return record.selected.test, "test prompts, with the edit applied live (the saved weights are not measured yet)"
    return record.selected.validation, "validation prompts (the ones the search was scored on)"


def direction_phrase(edit: dict[str, Any]) -> str:
    """`difference_in_means@0`, read at ..., used ... in words; of a trained edit, that it was trained."""
    if edit["direction_set"].startswith(PREFIX):
        return "trained by gradient through the frozen model (`docs/learned.md`)"
    name, _, protected = edit["direction_set"].partition("|protect")
    method, _, position = name.partition("@")
    places = [_place(at) for at in position.split("+")]
    where = f"{' and '.join(places)}{', joined' if len(places) > 1 else ''}"
    index = edit["direction_index"]
    scope = "each layer uses its own" if index is None else f"the one after layer {index:.2f} is used everywhere"
    cleaned = f", protected subspaces removed with strength {protected}" if protected else ""
    return f"{method.replace('_', ' ')}, read at {where}{cleaned}; {scope}"


def _place(position: str) -> str:
    if position in ("", "0"):
        return "the last prompt token"
    if position.startswith(OPENED):
        return f"token {position.removeprefix(OPENED)} of an answer made to begin as baseline answers do"
    return f"answer token {position}"


KERNEL_HEADER = ("Component", "Peak strength", "at layer", "Strength at the edge", "Layers from peak to edge", "Kernel")
TABLE_HEADER = ("Component", "Largest strength", "at layer", "Mean strength", "Layers edited")


def strength_header(edit: dict[str, Any]) -> tuple[str, ...]:
    """Of `strength_rows`: a trained edit has a strength for every layer instead of a kernel."""
    trained = any("strengths" in given for given in edit["components"].values())
    return TABLE_HEADER if trained else KERNEL_HEADER


def strength_rows(edit: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per component."""
    rows = []
    for component, given in edit["components"].items():
        if "strengths" in given:
            strengths = given["strengths"]
            edited = [strength for strength in strengths if strength > 0]
            peak = max(strengths)
            mean = sum(edited) / len(edited) if edited else 0.0
            row = (f"{peak:.3f}", str(strengths.index(peak)), f"{mean:.3f}", f"{len(edited)} of {len(strengths)}")
        else:
            peak = max(given["max_weight"], 0.0)
            position, distance = given["max_weight_position"], given["min_weight_distance"]
            shape = given.get("shape", "linear")
            edge = peak * (1.0 if shape == "flat" else given["min_weight"])
            row = (f"{peak:.3f}", f"{position:.2f}", f"{edge:.3f}", f"{distance:.2f}", shape)
        rows.append((component + of_parts(edit, component), *row))
    return rows


def of_parts(edit: dict[str, Any], component: str) -> str:
    """ " (12 experts in 4 layers)", where not all experts or heads of a component are edited."""
    parts = [part for part in edit.get("parts", {}).get(component, ()) if part is not None]
    return f" ({sum(map(len, parts))} {PART_NAMES[component]} in {len(parts)} layers)" if parts else ""


def coverage_rows(coverage: Iterable[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows (component, modules, parameters reached of those that write, share)."""
    rows = []
    for row in coverage:
        share = row["reached"] / row["total"] if row["total"] else 0.0
        modules = f"{row['modules']} x {row['detail']}"
        rows.append((row["component"], modules, f"{row['reached']:,} of {row['total']:,}", percent(share)))
    return rows


def changed_cells(changed: Mapping[str, float], components: Iterable[str]) -> list[str]:
    """Per component, what an edit changes of its weights."""
    return [percent(changed[name]) if name in changed else "-" for name in components]


def kept_rows(record: RunRecord) -> list[tuple[str, str]]:
    """(protected set, how many of its prompts are handled as before, with the interval)."""
    selected = record.selected
    if selected is None:
        return []
    rows = []
    for name, (kept, total) in selected.kept.items():
        low, high = wilson_interval(kept, total)
        rows.append((name, f"{kept}/{total} ({percent(low)} to {percent(high)})"))
    return rows


def method_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what the best trial of each method changes; empty where it was not measured."""
    components = list(dict.fromkeys(name for method in record.methods for name in method.changed))
    header = ["Method", "Trial", label("behaviour_rate"), label("kl_divergence"), *components]
    rows = [
        [
            method.method,
            str(method.trial),
            count_or_value(method.validation, "behaviour_rate"),
            count_or_value(method.validation, "kl_divergence"),
            *changed_cells(method.changed, components),
        ]
        for method in record.methods
    ]
    return header, rows
