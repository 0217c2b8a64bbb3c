"""What the hub shows of a card beside its text: evaluation results (`model-index`), and answers as examples (`widget`).

The forms are those of https://huggingface.co/docs/hub/model-cards and
https://huggingface.co/docs/hub/models-widgets-examples.
"""

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from bruno_ray.publishing import wording
from bruno_ray.runs.records import RunRecord, Sample

METRICS = {
    "target": ("behaviour_rate", "evasion_rate"),
    "baseline": ("baseline_behaviour_rate", "kl_divergence"),
}
"""Side of the test prompts -> what is told of them."""

UNSHOWN = ("refusal",)
"""Behaviours whose target prompts ask for harm: their answers are no examples for anybody."""

EXAMPLES = 3
LONGEST = 1000
"""Characters of an example's answer."""


def model_index(title: str, behaviour: str, record: RunRecord, datasets: Mapping[str, str]) -> list[dict[str, Any]]:
    """Figures on the test prompts, in the form of `model-index`; empty where none were measured.

    Args:
        datasets: side -> id of its data set on the hub, or a name for it.
    """
    scores, _ = wording.final_scores(record)
    if scores is None or (record.selected and scores is record.selected.validation):
        return []
    before = record.baseline.get("test")
    results = []
    for side, metrics in METRICS.items():
        found = [
            {"type": name, "value": round(scores.values[name], 6), "name": _with_counts(name, scores, before)}
            for name in metrics
            if name in scores.values
        ]
        if found:
            n = record.prompts.get(side, {}).get("test")
            name = f"{behaviour}: {f'{n} ' if n else ''}{side} prompts"
            results.append(
                {
                    "task": {"type": record.model.get("task", "text-generation")},
                    "dataset": {"type": datasets[side], "name": name, "split": "test"},
                    "metrics": found,
                }
            )
    return [{"name": title, "results": results}] if results else []


def _with_counts(metric: str, scores: Any, before: Any) -> str:
    if metric not in scores.counts:
        return wording.label(metric)
    counts = "{} of {}".format(*scores.counts[metric])
    if before is not None and metric in before.counts:
        counts += ", base model {} of {}".format(*before.counts[metric])
    return f"{wording.label(metric)} ({counts})"


def examples(behaviour: str, samples: Sequence[Sample]) -> list[Sample]:
    """The first answers before and after; to target prompts unless those ask for harm."""
    side = "baseline" if behaviour in UNSHOWN else "target"
    return [sample for sample in samples if sample.side == side][:EXAMPLES]


def widgets(chosen: Sequence[Sample]) -> list[dict[str, Any]]:
    """Examples as the hub's page offers them, with the edited model's answer."""
    return [
        {
            "example_title": shorten(sample.prompt, 40, placeholder=" ..."),
            "messages": [{"role": "user", "content": sample.prompt}],
            "output": {"text": _cut(sample.after)},
        }
        for sample in chosen
    ]


def quoted(text: str) -> str:
    """An answer as a block of code, which no text can leave."""
    return "\n".join(f"    {line}" for line in _cut(text).splitlines())


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
