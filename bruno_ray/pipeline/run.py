"""The story of a run, from two prompt sets to a proven, saved model.

    prompts -> residuals -> directions -> trials -> Pareto front -> one trial -> saved model, measured again -> report

Each step is a function of ``steps.py`` or of the module that is named after it; what can be done with a run
afterwards is in ``commands.py``.

What the search and the end of a run compute with here (Optuna, Tune, transformers) takes ten seconds to import. That is
done while the workers load the model, which takes as long, and not at the top.
"""

import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from bruno_ray.pipeline.method import decide_method
from bruno_ray.pipeline.stages import Laps, timed
from bruno_ray.pipeline.steps import (
    choose_parts,
    describe_model,
    evaluation_context,
    find_directions,
    find_model,
    find_response_prefix,
    judge_hash,
    open_run,
    plugin_hashes,
    require_places,
    score_unedited,
    with_name,
    with_plugins,
    worker_pool,
)
from bruno_ray.progress import phase
from bruno_ray.prompts.sets import Prompts, load_prompts
from bruno_ray.runs.directory import RunDirectory, refuse_existing
from bruno_ray.settings import Settings
from bruno_ray.settings.sources import apply, flatten
from bruno_ray.study.fingerprint import study_fingerprint
from bruno_ray.workers.session import ray_session

logger = logging.getLogger(__name__)


def run(settings: Settings, began: float | None = None) -> Path:
    """A new run; returns its directory. Raises OutputError if there is one of that name.

    Args:
        began: when the command began, of ``time.perf_counter``; now when not given.
    """
    laps = Laps(began)
    laps.end("program")
    settings = with_name(find_model(settings))
    path = settings.output.directory / str(settings.study.name)
    refuse_existing(path)
    laps.end("model")  # an organism is trained, others come from the hub
    return search(settings, path, laps)


def resume(
    path: Path,
    total: int | None = None,
    more: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    began: float | None = None,
) -> Path:
    """Go on with a run: trials under way when it stopped are evaluated, then new ones until the target."""
    from bruno_ray.pipeline.choosing import n_complete

    laps = Laps(began)
    laps.end("program")
    run = RunDirectory.open(path)
    settings = find_model(apply(run.read().settings, flatten(overrides or {}, "overrides")))
    done = n_complete(path, settings)
    if more is not None:
        total = done + more
    if total is not None:
        settings = settings.model_copy(update={"study": settings.study.model_copy(update={"n_trials": total})})
    if is_finished(run, settings, done):
        return path
    laps.end("model")
    return search(settings, path, laps)


def is_finished(run: RunDirectory, settings: Settings, done: int) -> bool:
    """Whether nothing is left to do for a run that picks by rule: its pick is saved and measured. The report is then
    written again, in case that is what was interrupted.

    Args:
        done: trials of its study that count.
    """
    from bruno_ray.pipeline.finishing import measured_folder

    record = run.read()
    same = settings.selection == record.settings.selection and settings.scoring == record.settings.scoring
    if not (settings.selection.auto and same and done >= settings.study.n_trials):
        return False
    if record.selected is None or (folder := measured_folder(run)) is None:
        return False
    from bruno_ray.pipeline import commands

    logger.info(
        "%s is finished: %d trials, trial %d is saved in %s; `bruno-ray resume %s --more N` adds trials,"
        " `bruno-ray save %s:N --to FOLDER` saves another one",
        *(run.name, done, record.selected.number, folder, run.name, run.name),
    )
    commands.report(run.path)
    return True


def search(settings: Settings, path: Path, laps: Laps) -> Path:
    """The run itself. Every step finds what an earlier, interrupted run has left and goes on from there.

    A person is asked for a trial last, when the report is written and the workers and Ray are gone: nobody can say how
    long it takes, and Ctrl-C is an answer too.
    """
    auto = settings.selection.auto
    settings = with_plugins(settings)
    plugin_hashes(settings)  # a file that is not there is said before anything is loaded
    judge_hash(settings)
    starts = []
    if settings.study.start_from or settings.study.storage or path.exists():  # else there is no study to look at
        from bruno_ray.pipeline.starting import starts_of

        starts = starts_of(settings, path)
    with phase("reading the prompts"):
        prompts = load_prompts(settings)
    laps.end("prompts")
    with resumable(path), ray_session(settings.ray):
        laps.end("ray")
        with worker_pool(settings) as pool:
            with phase("starting workers", pool.progress):
                from bruno_ray.pipeline.choosing import pick_automatically, study_of
                from bruno_ray.pipeline.finishing import folder_to_fill, has_room, score_selected, write_model
                from bruno_ray.pipeline.judging import judge_run
                from bruno_ray.pipeline.starting import effect_starts
                from bruno_ray.publishing import report
                from bruno_ray.study.run import run_study

                if auto:
                    import_module("bruno_ray.publishing.saving")
            pool.wait_ready()
            info = describe_model(settings, pool)
            require_places(settings, info)
            settings = decide_method(settings, prompts, pool)
            run = open_run(settings, path, info, prompts)
            laps.end("model")
            laps.note_in(run)
            with timed(run, "response_prefix", pool):
                record = run.update(response_prefix=find_response_prefix(run.read(), prompts, pool))
            with timed(run, "directions", pool):
                bank = find_directions(run, record, info, prompts, pool)
                record = choose_parts(run, info, prompts, bank, pool)
            with timed(run, "unedited", pool):
                validation = evaluation_context(record, prompts, "validation", bank, trains=True)
                score_unedited(run, "validation", validation, pool)
            with timed(run, "study"):
                asked = f"{prompts.fingerprint} of {record.date}" if info.prints_date else prompts.fingerprint
                fingerprint = study_fingerprint(settings, info, asked)
                starts = [*effect_starts(settings, path, info, prompts, tuple(bank), pool), *starts]
                run_study(settings, pool, validation, info, path, fingerprint, starts=starts)
            picked = pick_automatically(run, prompts, pool) if auto else None
            if picked is not None:
                with timed(run, "test", pool):
                    score_selected(run, picked, prompts, pool)
            folder = folder_to_fill(run, picked.number) if picked is not None else None
            if folder is not None and has_room(run.read()):
                write_model(run, prompts, folder, pool=pool)
                folder = None
            laps.begin()
        laps.end("stopping")
        if picked is not None:  # the workers are gone: their memory is free for a judge, and for what is saved
            judge_run(run)
            laps.end("judge")
        if folder is not None:
            write_model(run, prompts, folder)
        laps.begin()
    laps.end("stopping")
    with phase("writing the report"):
        report.write_report(run, study_of(path, settings))
    laps.end("report")
    if not auto:
        ask_and_save(run, prompts)
    return path


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Ctrl-C says how to go on, once there is something to go on with."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not (path / "run.json").is_file():
            raise
        raise KeyboardInterrupt(f"interrupted: `bruno-ray resume {shlex.quote(str(path))}` continues it") from interrupt


def ask_and_save(run: RunDirectory, prompts: Prompts) -> None:
    """Save the trial that somebody at the terminal picks, and write the report once more."""
    from bruno_ray.pipeline.choosing import pick
    from bruno_ray.pipeline.finishing import finish, folder_to_fill

    if (picked := pick(run)) is None:
        logger.info(
            "no trial was saved: `bruno-ray save %s` asks again, with --trial N or --auto it does not", run.name
        )
        return
    finish(run, prompts, lambda _: picked, folder_to_fill(run, picked.number))
