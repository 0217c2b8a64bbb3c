"""report.html: one file, no requests, everything that a run found out.

It is made from the run directory and the study alone, so that `bruno-ray report` can write it again at any time.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bruno_ray.files import write_text
from bruno_ray.publishing import card, comparing, plots, task_table, wording
from bruno_ray.publishing.environment import environment
from bruno_ray.publishing.training_account import training_account
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import ReadAnswer, Readings, RunRecord, ScoresRecord
from bruno_ray.study.selection import TrialRecord, load_trials, pareto_front
from bruno_ray.study.space import bound_lines
from bruno_ray.study.tables import describe_trial, metric_text, table_columns, with_selected

logger = logging.getLogger(__name__)

PLOT_OPTIONS = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}

FRONT_ROWS = 12
FLIP_ROWS = 20
SAMPLES = 24
DISAGREEMENTS = 6
"""Answers before, and as many after, that the readers do not agree on."""


@dataclass(frozen=True)
class Plot:
    """A picture, or the sentence that stands in its place."""

    title: str
    html: Markup | None
    note: str = ""


def write_report(run: RunDirectory, study: optuna.Study) -> Path:
    """Write report.html of ``run``; returns its path. Raises OutputError if the run cannot be read or written."""
    write_text(run.report_file, render_report(run, study))
    logger.info("report: %s", run.report_file)
    return run.report_file


def render_report(run: RunDirectory, study: optuna.Study) -> str:
    record = run.read()
    settings = record.settings
    objectives = settings.scoring.objectives
    trials = load_trials(study)
    front = pareto_front(trials, objectives)
    columns = table_columns(front, objectives)
    states = {
        state: sum(trial.state == state for trial in trials) for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
    }
    geometry, test_prompts = run.load_geometry(), run.load_test_prompts()
    selected = record.selected
    number = selected.number if selected else None
    scores, measured_on = wording.final_scores(record)
    cost = run.load_cost()
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            plotly_js=Markup(get_plotlyjs()),
            name=run.name,
            base=card.base_name(settings),
            behaviour=card.behaviour_name(settings),
            model=record.model,
            states=states,
            seconds=sum(record.timings.values()),
            cost=""
            if cost is None
            else cost.text(states["COMPLETE"] + states["PRUNED"], selected.number if selected else None),
            selected=selected,
            measured_on=measured_on,
            tiles=tiles(record, scores),
            comparison=comparison(record),
            comparison_columns=comparison_columns(record),
            meanings=wording.meanings(metric for _, scores in _measurements(record) for metric in scores.values),
            warnings=comparing.suspicions(record),
            optimism=comparing.optimism(record),
            comparisons=[
                (wording.label(found.metric), found.other, found.text, found.verdict)
                for found in comparing.comparisons(record)
            ],
            finalists=finalists(record),
            methods=wording.method_rows(record),
            kept=wording.kept_rows(record),
            categories=comparing.by_category(record, test_prompts),
            flips=comparing.flips(record, test_prompts),
            flip_rows=FLIP_ROWS,
            tasks=task_table.task_rows(task_table.of_selected(record)),
            task_header=task_table.HEADER,
            extra={name: wording.plain(value) for name, value in record.extra.items()},
            samples=run.load_samples()[:SAMPLES],
            disagreements=disagreements(record, run.load_readings()),
            front=trial_rows(with_selected(front, trials, number), columns, number),
            given=trial_rows([trial for trial in trials if trial.origin and trial.values], columns, number),
            front_rows=FRONT_ROWS,
            front_columns=[wording.label(name) for name in columns],
            bounds=bound_lines(
                settings.search,
                next((trial.distributions for trial in study.get_trials(deepcopy=False) if trial.distributions), {}),
                [trial.params for trial in front],
                record.model.get("n_layers", 1),
            ),
            study_plots=study_plots(study, trials, objectives, number),
            detail_plots=detail_plots(study, objectives),
            geometry=geometry,
            geometry_plots=geometry_plots(geometry),
            geometry_rows=geometry_rows(geometry),
            protected=protected_rows(geometry),
            edit=selected.edit if selected else None,
            direction=wording.direction_phrase(selected.edit) if selected else "",
            direction_options=card.direction_options(settings),
            norm_mode=wording.NORM_MODES[selected.edit["norm_mode"]] if selected else "",
            strength_header=wording.strength_header(selected.edit) if selected else (),
            strengths=wording.strength_rows(selected.edit) if selected else [],
            kernel_plot=kernel_plot(record),
            training=training_account(run, selected),
            coverage=wording.coverage_rows(record.coverage),
            prompts=card.prompt_rows(record),
            response_prefix=record.response_prefix,
            config=card.reproduction_config(settings),
            command=card.public_command(record.command),
            facts={
                "Versions": record.versions,
                "Fingerprints": record.hashes,
                "Seeds": record.seeds,
                "Seconds per stage": {name: f"{seconds:.1f}" for name, seconds in record.timings.items()},
            },
        )
    )


# ----- figures -----


def tiles(record: RunRecord, scores: ScoresRecord | None) -> list[dict[str, str]]:
    """The headline: one tile per objective, and the KL and behaviour rate if they are measured at all."""
    if scores is None:
        return []
    part = "validation" if record.selected and scores is record.selected.validation else "test"
    before = record.baseline.get(part)
    wanted = dict.fromkeys([*record.settings.scoring.objectives, "behaviour_rate", "kl_divergence"])
    found = []
    for metric in [name for name in wanted if name in scores.values]:
        tile = {"label": wording.label(metric), "metric": metric, "before": "", "note": ""}
        if metric in scores.counts:
            events, total = scores.counts[metric]
            tile["value"] = f"{events}/{total}"
            tile["note"] = f"{wording.percent(events / total)}, 95 % interval {wording.interval_of(scores, metric)}"
        else:
            tile["value"] = wording.number(scores.values[metric])
        if metric == "kl_divergence" and {"kl_median", "kl_p95"} <= scores.values.keys():
            median, p95 = (wording.number(scores.values[name]) for name in ("kl_median", "kl_p95"))
            tile["note"] = f"median {median}, 95th percentile {p95}"
        if before and metric in before.counts:
            tile["before"] = "{}/{}".format(*before.counts[metric])
        elif before and metric in before.values and metric not in wording.DISTANCES:
            tile["before"] = wording.number(before.values[metric])
        found.append(tile)
    return found


def _measurements(record: RunRecord) -> list[tuple[str, ScoresRecord]]:
    """(column, scores) of all that was measured."""
    selected = record.selected
    columns = [
        ("Unedited, validation", record.baseline.get("validation")),
        ("Selected trial, validation", selected.validation if selected else None),
        ("Unedited, test", record.baseline.get("test")),
        ("Live edit, test", selected.test if selected else None),
        ("Saved model, test", selected.saved if selected else None),
    ]
    return [(name, scores) for name, scores in columns if scores is not None]


def comparison_columns(record: RunRecord) -> list[str]:
    return [name for name, _ in _measurements(record)]


def comparison(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows (metric, one cell per measurement); a cell is the figure and its interval, if it has one."""
    measurements = _measurements(record)
    metrics = dict.fromkeys(metric for _, scores in measurements for metric in scores.values)
    return [
        (
            wording.label(metric),
            [
                (wording.count_or_value(scores, metric), wording.interval_of(scores, metric))
                for _, scores in measurements
            ],
        )
        for metric in metrics
    ]


# ----- readers -----


@dataclass(frozen=True)
class Disagreements:
    """Where the readers of one list of answers do not agree."""

    title: str
    pairs: list[str]
    """One sentence per two readers."""

    answers: list[tuple[ReadAnswer, str]]
    """The first answers that are not unanimous, with what each reader says."""


def disagreements(record: RunRecord, readings: Readings | None) -> list[Disagreements]:
    """Before and after the edit; empty where fewer than two readers have read."""
    if readings is None or record.selected is None or readings.trial != record.selected.number:
        return []
    columns = (("Before", readings.unedited), ("After", readings.saved or readings.edited))
    found = []
    for title, answers in columns:
        readers = list(dict.fromkeys(reader for answer in answers for reader in answer.shows))
        pairs = [_pair(answers, *pair) for pair in combinations(readers, 2)]
        divided = [answer for answer in answers if len(set(_verdicts(answer).values())) > 1]
        if pairs:
            shown = [(answer, _said_by_each(answer)) for answer in divided[:DISAGREEMENTS]]
            found.append(Disagreements(title, pairs, shown))
    return found


def _verdicts(answer: ReadAnswer) -> dict[str, bool]:
    return {reader: p > 0.5 for reader, p in answer.shows.items() if p is not None}


def _pair(answers: list[ReadAnswer], one: str, other: str) -> str:
    both = [verdicts for verdicts in map(_verdicts, answers) if one in verdicts and other in verdicts]
    only_one = sum(verdicts[one] and not verdicts[other] for verdicts in both)
    only_other = sum(verdicts[other] and not verdicts[one] for verdicts in both)
    return (
        f"{one.capitalize()} and {other} disagree on {only_one + only_other} of {len(both)} answers: {only_one} show it"
        f" by the {one} only, {only_other} by the {other} only."
    )


def _said_by_each(answer: ReadAnswer) -> str:
    said = []
    for reader, p in answer.shows.items():
        sure = "" if reader == "markers" or p is None else f" ({p:.2f})"
        said.append(f"{reader}: {'silent' if p is None else 'yes' if p > 0.5 else 'no'}{sure}")
    return ", ".join(said)


# ----- rows -----


def finalists(record: RunRecord) -> dict[str, Any] | None:
    """The best trials, measured again: headers and a row each; None if that was not done."""
    if not record.finalists:
        return None
    metrics = list(dict.fromkeys(name for scores in record.finalists.values() for name in scores.values))
    selected = str(record.selected.number) if record.selected else None
    rows = [
        (number, number == selected, [wording.count_or_value(scores, name) for name in metrics])
        for number, scores in record.finalists.items()
    ]
    return {"columns": [wording.label(name) for name in metrics], "rows": rows}


def trial_rows(trials: Sequence[TrialRecord], columns: Sequence[str], selected: int | None) -> list[dict[str, Any]]:
    return [
        {
            "number": trial.number,
            "cells": [metric_text(trial, name) for name in columns],
            "edit": describe_trial(trial),
            "selected": trial.number == selected,
        }
        for trial in trials
    ]


def geometry_rows(geometry: dict[str, Any] | None) -> list[list[str]]:
    if geometry is None:
        return []
    keys = ("target_norm", "baseline_norm", "difference_norm", "cosine", "effect_size", "auroc", "silhouette")
    return [[plots.point_name(row["point"]), *(wording.number(row[key]) for key in keys)] for row in geometry["points"]]


def protected_rows(geometry: dict[str, Any] | None) -> list[tuple[str, str, str, str, str]]:
    """Rows (protected set, direction set, overlap's median over layers, highest, at which stream point)."""
    rows = []
    for name, found in ((geometry or {}).get("protected") or {}).items():
        for directions, overlaps in found.items():
            layers = overlaps[1:]  # the embedding output is not edited
            highest = max(range(len(layers)), key=layers.__getitem__)
            shares = (wording.percent(statistics.median(layers)), wording.percent(layers[highest]))
            rows.append((name, directions, *shares, plots.point_name(highest + 1)))
    return rows


# ----- pictures -----


def study_plots(
    study: optuna.Study, trials: list[TrialRecord], objectives: tuple[str, ...], selected: int | None
) -> list[Plot]:
    front_note = "A front needs two objectives." if len(objectives) < 2 else "No trial is complete yet."
    few = f"Importances need at least {plots.FEWEST_FOR_IMPORTANCE} completed trials."
    return [
        plot("Pareto front", plots.pareto_front(trials, objectives, selected), front_note),
        plot("Optimisation history", plots.history(trials, objectives), "No trial is complete yet."),
        plot("Parameter importances", plots.importances(study, objectives), few),
    ]


def detail_plots(study: optuna.Study, objectives: tuple[str, ...]) -> list[Plot]:
    pictures = []
    for i, name in enumerate(objectives):
        title = wording.label(name)
        pictures.append(plot(f"{title} over each parameter", plots.slices(study, i, name), "No trial is complete yet."))
        pictures.append(plot(f"{title}: all parameters", plots.parallel(study, i, name), "This needs two trials."))
    return pictures


def geometry_plots(geometry: dict[str, Any] | None) -> list[Plot]:
    if geometry is None:
        return []
    return [
        plot("Target and baseline prompts in their principal plane", plots.planes(geometry)),
        plot("Separation along the stream", plots.separation(geometry)),
    ]


def kernel_plot(record: RunRecord) -> Plot | None:
    if record.selected is None or not record.model.get("n_layers"):
        return None
    return plot("Ablation strength over layers", plots.kernels(record.selected.edit, record.model["n_layers"]))


def plot(title: str, figure: go.Figure | None, note: str = "") -> Plot:
    if figure is None:
        return Plot(title, None, note)
    html = figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, config=PLOT_OPTIONS)
    return Plot(title, Markup(html))
