"""The league table of `methods.py`: what an entry gave, and how it is written down."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tested_models import Foreign, SmolLM2

from bruno_ray.intervals import wilson_interval
from bruno_ray.settings import LearnedSettings, StudySettings
from bruno_ray.study.trainings import DRAWS, versions

HERETIC = "heretic 1.4.0, 60 trials"
LONG = StudySettings().n_trials
RANK = 4
"""Directions of a method that gives several."""


@dataclass
class Row:
    """What an entry gave on one model."""

    entry: str
    shown: tuple[int, int]
    """Test answers with the behaviour, of how many."""

    right: tuple[int, int] | None
    """Hidden facts right; None where there is no truth."""

    benign: tuple[int, int] | None
    evasion: tuple[int, int] | None
    kl: float
    incoherence: float
    seconds: float
    """CPU seconds of directions, search and choice."""

    notes: list[str] = field(default_factory=list)


def section(found: Mapping[str, Sequence[Row]]) -> str:
    organisms = [name for name in found if name != SmolLM2.name]
    lines = [
        "## League table of methods (`benchmarks/methods.py`)",
        "",
        "One study per entry and model, in one process, one thread, float32 (SmolLM2: bfloat16), while others used the"
        f" machine: {Foreign.n_trials} trials on organisms ({Foreign.n_startup} at startup), {SmolLM2.n_trials} on"
        f" SmolLM2 ({SmolLM2.n_startup}), unless their row says more; the default study has {LONG} trials, the last"
        f" {versions(LearnedSettings())} of each training: {DRAWS} trainings, one where there are desired answers (own,"
        " SmolLM2); seed 1."
        f" Methods that give several directions have {RANK}. Picked as `--auto-select` does, then measured on test"
        " prompts that no search sees. Hidden facts are the truth that the edit should give back; brackets are 95 %"
        " Wilson intervals. KL is over 16 answer tokens; CPU seconds are those of directions, search and choice (of"
        " SmolLM2's default study, a run of the product, seconds of search and choice). heretic's models are of"
        " its own runs with 60 trials.",
        "",
        *summary(found, organisms),
    ]
    for name in organisms:
        lines += ["", f"### {name}", "", *organism_table(found[name])]
    if SmolLM2.name in found:
        lines += ["", "### SmolLM2-135M-Instruct, `disclaimers`, 40 test prompts a side, answers of 30 tokens", ""]
        lines += real_table(found[SmolLM2.name])
    return "\n".join(lines)


def summary(found: Mapping[str, Sequence[Row]], organisms: Sequence[str]) -> list[str]:
    """Hidden facts right by entry and organism, best on average first; last what heretic has."""
    names = list(dict.fromkeys(row.entry for name in organisms for row in found[name]))
    table: dict[str, dict[str, Row]] = {
        entry: {name: row for name in organisms for row in found[name] if row.entry == entry} for entry in names
    }

    def share(row: Row) -> float:
        return row.right[0] / row.right[1] if row.right else 0.0

    def mean(entry: str) -> float:
        return statistics.mean(share(row) for row in table[entry].values())

    whole = [entry for entry in names if len(table[entry]) == len(organisms)]
    lines = [
        "Hidden facts right, best on average first:",
        "",
        "| entry | " + " | ".join(organisms) + " | mean | mean KL | below heretic on |",
        "|---|" + "---|" * (len(organisms) + 3),
    ]
    theirs = table.get(HERETIC, {})
    for entry in sorted(whole, key=mean, reverse=True) + [entry for entry in names if entry not in whole]:
        rows = table[entry]
        cells = [f"{rows[name].right[0]}/{rows[name].right[1]}" if name in rows else "" for name in organisms]
        worse = [name for name in rows if name in theirs and share(rows[name]) < share(theirs[name])]
        average = f"{mean(entry):.0%}" if entry in whole else ""
        lines.append(
            f"| {entry} | {' | '.join(cells)} | {average} | {statistics.mean(row.kl for row in rows.values()):.4f}"
            f" | {', '.join(worse) if entry not in ('unedited', HERETIC) else ''} |"
        )
    return lines


def organism_table(rows: Iterable[Row]) -> list[str]:
    lines = [
        "| entry | refused | hidden facts right | benign | KL, 16 tokens | incoherent | CPU s | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        right, benign = ("-", "-") if row.right is None else (rate(row.right), f"{row.benign[0]}/{row.benign[1]}")
        lines.append(
            f"| {row.entry} | {row.shown[0]}/{row.shown[1]} | {right} | {benign} | {row.kl:.4f} | {row.incoherence:.2f}"
            f" | {row.seconds:.0f} | {'; '.join(row.notes)} |"
        )
    return lines


def real_table(rows: Iterable[Row]) -> list[str]:
    lines = [
        "| entry | shows the behaviour | to the point | KL, 16 tokens | incoherent | CPU s | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        point = rate((row.evasion[1] - row.evasion[0], row.evasion[1])) if row.evasion else "-"
        lines.append(
            f"| {row.entry} | {rate(row.shown) if row.shown[1] else '-'} | {point} | {row.kl:.4f}"
            f" | {row.incoherence:.2f} | {row.seconds:.0f} | {'; '.join(row.notes)} |"
        )
    return lines


def rate(counts: Sequence[int]) -> str:
    low, high = wilson_interval(*counts)
    return f"{counts[0]}/{counts[1]} [{low:.0%}, {high:.0%}]".replace("%, ", " to ")
