"""A run of a tiny real model whose directions were really found, with two trials; nothing of it is made up but the
study's scores."""

import datetime
import json
from pathlib import Path

import optuna

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.pipeline.steps import find_directions, open_run
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import (
    DatasetSettings,
    ModelSettings,
    OutputSettings,
    PromptSet,
    PromptSettings,
    ResidualSettings,
    ScoringSettings,
    Settings,
    StudySettings,
)
from bruno_ray.study.storage import open_storage
from tests.support.inline_pool import InlinePool

DAY = datetime.date(2024, 2, 29)


def write_prompts(folder: Path, n: int = 18) -> dict[str, Path]:
    """side -> file of prompts of one kind."""
    files = {}
    for side, word in (("target", "stone"), ("baseline", "river")):
        files[side] = folder / f"{side}.jsonl"
        rows = [json.dumps({"prompt": f"Tell me about {word} {i}."}) for i in range(n)]
        files[side].write_text("\n".join(rows) + "\n")
    return files


def settings_for(model: Path, folder: Path, markers: tuple[str, ...]) -> Settings:
    sides = {
        side: PromptSet(train=DatasetSettings(source=str(file), column="prompt"))
        for side, file in write_prompts(folder).items()
    }
    return Settings(
        model=ModelSettings(id=str(model), dtypes=("float32",)),
        behaviour="stones",
        prompts=PromptSettings(**sides, n_train=8, n_validation=3, n_test=4, n_finalists=0, response_prefix=""),
        residuals=ResidualSettings(cache_dir=folder / "residuals"),
        scoring=ScoringSettings(
            scorers=("behaviour_rate", "kl_divergence", "to_the_point"),
            report_scorers=("baseline_behaviour",),
            markers=markers,
            response_tokens=4,
            report_tokens=8,
        ),
        study=StudySettings(name="mine"),
        output=OutputSettings(directory=folder / "runs"),
    )


EDITS = {
    index: Edit(
        {"attention": AblationParameters(1.2, 1.5, 0.3, 2.0), "mlp": AblationParameters(0.9, 1.0, 0.5, 1.5)},
        "difference_in_means@0",
        float(index),
        "full",
    )
    for index in (0, 1)
}
"""By trial; the number is the layer of the direction as well."""


def make(settings: Settings) -> RunDirectory:
    """The run when its search is over."""
    prompts = load_prompts(settings)
    pool = InlinePool(settings)
    info = pool.call("describe")
    run = open_run(settings, settings.output.directory / "mine", info, prompts)
    record = run.update(date=DAY)
    find_directions(run, record, info, prompts, pool)
    study = optuna.create_study(
        study_name="mine", storage=open_storage(None, run.path), directions=["minimize"] * 2, sampler=None
    )
    for edit in EDITS.values():
        trial = study.ask()
        trial.suggest_float("x", 0, 1)  # pictures of parameters need one
        trial.set_user_attr("edit", edit.to_dict())
        values = {"behaviour_rate": 0.5, "kl_divergence": 0.01, "evasion_rate": 0.5}
        trial.set_user_attr("result", {"values": values, "counts": {"behaviour_rate": [2, 4]}})
        study.tell(trial, (0.5, 0.01))
    return run
