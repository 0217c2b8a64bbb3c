"""The door for Python programs and notebooks; everything here is found as ``bruno_ray.NAME``.

import bruno_ray as br

run = br.run("smollm2", behaviour="disclaimers", trials=40)      # as `bruno-ray run`; or br.open_run("runs/x")
run.front                                                        # trials, with their metrics
edited = run.model(trial=12)                                     # None: the selected one
edited.generate(["What is a reef?"]), edited.generate(["What is a reef?"], edited=False)

bank = br.find_directions(model, tokenizer, target, baseline)         # any transformers model
with br.ablate(model, br.everywhere(bank), bank):
    model.generate(...)                                          # transformers' own
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.errors import OutputError
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.lookup import find_run
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import sources
from bruno_ray.study.selection import TrialRecord, find_trial, pareto_front

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bruno_ray.ablation.closed_forms import DirectionBank
    from bruno_ray.generation.engine import BatchEngine
    from bruno_ray.model.architectures import Architecture

COMPONENTS = ("attention", "mlp")


# ----- runs -----


def run(
    model: str,
    *,
    behaviour: str | None = None,
    trials: int | None = None,
    name: str | None = None,
    config: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Search for an edit, save the best trial by rule, and measure what was saved; see `bruno-ray run`.

    Args:
        model: hub id, folder, GGUF file, or a named model such as "smollm2".
        behaviour: a preset, or any name where ``settings`` give both prompt sets.
        trials: of the study; the preset's number when not given.
        name: of the run, a folder below ``output.directory``.
        config: a TOML file, as for `--config`.
        settings: any others, nested: ``{"study": {"seed": 7}, "ray": {"workers": 2}}``. They win over all else.

    Raises:
        BrunoError: a subclass of it, with one line that says what to do.
    """
    from bruno_ray.pipeline.run import run as run_pipeline

    given: dict[str, Any] = {"model": {"id": model}, "selection": {"auto": True}}
    if behaviour is not None:
        given["behaviour"] = behaviour
    study = {"n_trials": trials, "name": name}
    given["study"] = {key: value for key, value in study.items() if value is not None}
    return Run(
        RunDirectory.open(run_pipeline(sources.load(config=config, overrides=_merged(given, settings)).settings))
    )


def open_run(reference: str | Path) -> Run:
    """A run by its folder, or by its name below ``output.directory``. Raises OutputError if there is none."""
    return Run(find_run(str(reference)))


class Run:
    """A run on disk, finished or not."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def __repr__(self) -> str:
        selected = self.record.selected
        which = "no trial is selected" if selected is None else f"trial {selected.number} is selected"
        return f"<Run {self._directory.name}: {self.record.settings.model.id}, {which}>"

    @property
    def path(self) -> Path:
        return self._directory.path

    @property
    def record(self) -> RunRecord:
        """run.json as it is now: settings, versions, hashes, timings, scores, the selected trial."""
        return self._directory.read()

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials by number; the search may still be running."""
        from bruno_ray.pipeline.choosing import trials_of

        return trials_of(self.path, self.record.settings)

    @property
    def front(self) -> list[TrialRecord]:
        """The Pareto front of the completed trials."""
        complete = [trial for trial in self.trials if trial.state == "COMPLETE"]
        return pareto_front(complete, self.record.settings.scoring.objectives)

    def directions(self) -> DirectionBank:
        """Direction set -> (n_layers + 1, rank, d_model) float32: what the search chose from, and what was trained."""
        return self._directory.load_directions()

    def edit(self, trial: int | None = None) -> Edit:
        """The edit of a trial; of the selected one if none is named.

        Raises OutputError if none is selected, StudyError if there is no such trial.
        """
        selected = self.record.selected
        if trial is None or (selected is not None and trial == selected.number):
            if selected is None:
                raise OutputError(f"no trial of {self._directory.name} is selected: name one, such as trial=0")
            return Edit.from_dict(selected.edit)
        found = find_trial(self.trials, trial)
        if found.edit is None:
            raise OutputError(f"trial {trial} of {self._directory.name} has no edit: it was never evaluated")
        return Edit.from_dict(found.edit)

    def model(self, trial: int | None = None) -> EditedModel:
        """The base model with a trial's edit applied live. The base is loaded once for all trials of a run."""
        return EditedModel(self, self.edit(trial))

    @cached_property
    def engine(self) -> BatchEngine:
        """The base model in memory, as the search computed with it; loaded when it is first asked for."""
        from bruno_ray.generation.engine import BatchEngine
        from bruno_ray.model.loading import load_model

        return BatchEngine(load_model(self.record.settings.model))

    def save(self, trial: int | None = None, to: Path | None = None) -> Path:
        """Bake a trial, write the model, measure what was written; see `bruno-ray save`. Returns its folder."""
        from bruno_ray.pipeline.commands import save

        return save(self.path, trial=trial, auto=trial is None, to=None if to is None else Path(to))

    def resume(self, more: int | None = None) -> Run:
        """Go on with the search: to the number of trials that was set, or for this many more."""
        from bruno_ray.pipeline.run import resume

        resume(self.path, more=more, overrides={"selection": {"auto": True}})
        return self


class EditedModel:
    """A base model under one edit, for answers to prompts as the run gave them."""

    def __init__(self, run: Run, edit: Edit) -> None:
        self.edit = edit
        self._run = run

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 256,
        *,
        system_prompt: str | None = None,
        edited: bool = True,
    ) -> list[str]:
        """Greedy answers, in the order of the prompts; of the unedited model with ``edited=False``."""
        from bruno_ray.prompts.rendering import render
        from bruno_ray.prompts.sets import Prompt

        engine, record = self._run.engine, self._run.record
        system = record.settings.prompts.system_prompt if system_prompt is None else system_prompt
        asked = [Prompt(text, system) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        ids = render(engine.tokenizer, asked, record.response_prefix, date=record.date)
        resolved = engine.editor.resolve(self.edit, self._run.directions()) if edited else None
        (answers,) = engine.generate(ids, [resolved], max_new_tokens)
        return [answer.text for answer in answers]


# ----- any model of transformers -----


def find_directions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Sequence[str],
    baseline: Sequence[str],
    *,
    methods: Sequence[str] = ("difference_in_means",),
    rank: int = 1,
    system_prompt: str | None = None,
) -> DirectionBank:
    """Directions of a behaviour from contrasting prompts, read at the end of each, through the chat template.

    Returns:
        "METHOD@0" -> (n_layers + 1, rank, d_model) float32, orthonormal rows at each point of the residual stream.

    Raises:
        ModelError: the model cannot be edited, or its residuals are not finite.
        PromptError: the two sets do not differ.
    """
    from bruno_ray.directions import build_bank
    from bruno_ray.model.batching import input_device
    from bruno_ray.model.loading import LoadedModel
    from bruno_ray.prompts.rendering import render
    from bruno_ray.prompts.sets import Prompt
    from bruno_ray.residuals.extraction import extract_residuals

    architecture = _architecture(model)
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        processor=None,
        architecture=architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint="",
        device=input_device(architecture.embedding),
        generation_config=model.generation_config,
    )
    sides = []
    for texts in (target, baseline):
        ids = render(tokenizer, [Prompt(text, system_prompt) for text in texts], date=datetime.date.today())
        sides.append(extract_residuals(loaded, ids))
    return build_bank(*sides, methods=tuple(methods), rank=rank)


def everywhere(
    bank: DirectionBank, strength: float = 1.0, direction_set: str | None = None, layer: float | None = None
) -> Edit:
    """The edit of the literature (Arditi et al. 2024, https://arxiv.org/abs/2406.11717): every write of every layer
    loses the direction. ``layer`` uses that layer's direction everywhere; None gives each layer its own."""
    name = next(iter(bank)) if direction_set is None else direction_set
    flat = AblationParameters(strength, 0.0, 1.0, float(len(bank[name])))
    return Edit(dict.fromkeys(COMPONENTS, flat), name, layer, "none")


@contextmanager
def ablate(model: PreTrainedModel, edit: Edit, directions: DirectionBank) -> Iterator[None]:
    """Within the block every forward pass of ``model`` is edited, through hooks; its weights are not touched.

    Raises ModelError if the model cannot be edited.
    """
    from bruno_ray.ablation.live import LiveEditor

    editor = LiveEditor(_architecture(model))
    try:
        editor.set([editor.resolve(edit, directions)], [0])  # one row: all tokens of a batch, however many, are its
        yield
    finally:
        editor.close()


def bake(model: PreTrainedModel, edit: Edit, directions: DirectionBank) -> None:
    """Put the edit into the model's weights, in place: it computes what it would under `ablate`."""
    from bruno_ray.ablation.baking import bake as bake_weights

    bake_weights(_architecture(model), edit, directions)


def _architecture(model: PreTrainedModel) -> Architecture:
    """By the table, or by probing: whoever hands over a model in memory has accepted it."""
    from bruno_ray.model.architectures import find_architecture
    from bruno_ray.model.families import in_table, require_known
    from bruno_ray.model.probed import watched

    require_known(model.config, getattr(model, "name_or_path", "") or type(model).__name__)
    return find_architecture(model) if in_table(model.config) else watched(model)


def _merged(given: dict[str, Any], more: Mapping[str, Any] | None) -> dict[str, Any]:
    """``more`` over ``given``, group by group."""
    result = dict(given)
    for key, value in (more or {}).items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return result
