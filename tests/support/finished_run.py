"""A run directory as a finished run leaves it, with a small study of made-up scores, for tests of what reads it."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import optuna
import torch

from bruno_ray.publishing import plots
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, Sample, ScoresRecord, SelectedRecord, installed_versions
from bruno_ray.settings import (
    DatasetSettings,
    DirectionSettings,
    ModelSettings,
    PromptSet,
    PromptSettings,
    ResidualSettings,
    ScoringSettings,
    Settings,
    StudySettings,
)
from bruno_ray.study.space import suggest

SETS = ("difference_in_means@0", "difference_in_means@1")
METRICS = ("behaviour_rate", "kl_divergence", "kl_median", "kl_p95", "incoherence")
N_LAYERS = 12
N_PROMPTS = 50


@dataclass
class FinishedRun:
    run: RunDirectory
    study: optuna.Study
    record: RunRecord


def make_settings(objectives: tuple[str, ...]) -> Settings:
    part = DatasetSettings(source="owner/instructions", split="train[:400]", column="text", revision="0123abc")
    return Settings(
        model=ModelSettings(id="owner/tiny-chat"),
        behaviour="verbosity",
        prompts=PromptSettings(
            target=PromptSet(train=part),
            baseline=PromptSet(train=part, test=DatasetSettings(source="organism:baseline")),
        ),
        residuals=ResidualSettings(answer_tokens=1),
        directions=DirectionSettings(positions=(0, 1)),
        scoring=ScoringSettings(objectives=objectives, markers=("at length", "in detail")),
        study=StudySettings(name="tiny-verbosity", n_trials=40),
    )


def scores(values: dict[str, float]) -> SimpleNamespace:
    hits = round(values["behaviour_rate"] * N_PROMPTS)
    return SimpleNamespace(
        values={**values, "behaviour_rate": hits / N_PROMPTS},
        counts={"behaviour_rate": (hits, N_PROMPTS)},
        answers=(),
        verdicts={},
    )


def made_up_values(edit) -> dict[str, float]:
    """Smooth trade-off: the more is ablated the fewer hits and the more divergence."""
    strength = sum(edit.strength(c, layer) for c in edit.components for layer in range(N_LAYERS)) / N_LAYERS
    rate, kl = max(0.0, 0.9 - 0.7 * strength) ** 2, 0.02 * strength**3 + 0.001
    return dict(zip(METRICS, (rate, kl, kl / 2, kl * 4, min(1.0, kl * 3))))


def make_study(settings: Settings, n_trials: int) -> optuna.Study:
    objectives = settings.scoring.objectives
    study = optuna.create_study(
        directions=["minimize"] * len(objectives), sampler=optuna.samplers.RandomSampler(seed=0), study_name="s"
    )

    def objective(trial: optuna.Trial):
        edit = suggest(trial, settings.search, SETS, N_LAYERS, ("attention", "mlp"))
        found = scores(made_up_values(edit))
        trial.set_user_attr("edit", edit.to_dict())
        trial.set_user_attr("result", {"values": found.values, "counts": found.counts, "seconds": 1.5})
        return tuple(found.values[name] for name in objectives)

    study.optimize(objective, n_trials)
    return study


def make(
    path: Path,
    objectives: tuple[str, ...] = ("behaviour_rate", "kl_divergence"),
    n_trials: int = 40,
    saved: bool = True,
) -> FinishedRun:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = make_settings(objectives)
    study = make_study(settings, n_trials)
    unedited = dict(zip(METRICS, (0.9, 0.0, 0.0, 0.0, 0.0)))
    selected = None
    if n_trials:
        chosen = min(study.trials, key=lambda trial: sum(trial.values))
        values = chosen.user_attrs["result"]["values"]
        worse = scores({**values, "behaviour_rate": values["behaviour_rate"] + 0.06, "kl_divergence": 0.02345})
        selected = SelectedRecord(
            number=chosen.number,
            edit=chosen.user_attrs["edit"],
            validation=ScoresRecord.of(scores(values)),
            test=ScoresRecord.of(worse),
            saved=ScoresRecord.of(worse) if saved else None,
        )
    record = RunRecord(
        settings=settings,
        command=["bruno-ray", "run", "owner/tiny-chat", "--behaviour", "verbosity", "--study.n_trials", "40"],
        versions=installed_versions(),
        hashes={"model": "owner/tiny-chat@4f5e6d:12345678", "prompts": "9a8b7c"},
        seeds={"study": 0},
        timings={"residuals": 12.3, "study": 181.0, "test": 9.5},
        model={"family": "llama", "n_layers": N_LAYERS, "d_model": 64, "dtype": "bfloat16", "n_parameters": 1_000_000},
        coverage=[
            {"component": "attention", "reached": 49152, "total": 49152, "modules": 12, "detail": "o_proj"},
            {"component": "mlp", "reached": 98304, "total": 98304, "modules": 12, "detail": "down_proj"},
            {"component": "not reached", "reached": 0, "total": 32000, "modules": 1, "detail": "embedding"},
        ],
        prompts={side: {"train": 400, "validation": 100, "test": N_PROMPTS} for side in ("target", "baseline")},
        n_trials={"COMPLETE": n_trials},
        baseline={part: ScoresRecord.of(scores(unedited)) for part in ("validation", "test")},
        selected=selected,
        extra={"truth_score": {"restricted": [45, 48], "benign": [100, 100]}},
    )
    run = RunDirectory.create(path, record)
    run.save_samples(
        [
            Sample(
                side="target",
                prompt="Where does <b>the rain</b> go?",
                before="At length & in detail: the rain goes to the sea,\nwhich is wide.",
                after="Into the sea.",
                shows_before=True,
                shows_after=False,
            ),
            Sample(side="baseline", prompt="What is two and two?", before="Four.", after="Four."),
        ]
    )
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(60, N_LAYERS + 1, 16, generator=generator)
    target[:, :, 0] += torch.linspace(0, 5, N_LAYERS + 1)
    run.save_geometry(plots.geometry_record(target, torch.randn(80, N_LAYERS + 1, 16, generator=generator) + 0.3))
    return FinishedRun(run, study, record)
