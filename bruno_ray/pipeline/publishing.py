"""A trial goes to the hub: `bruno-ray publish RUN`. Folders need no more than ``publishing.hub``."""

import logging

from bruno_ray.errors import OutputError
from bruno_ray.pipeline import commands
from bruno_ray.pipeline.finishing import free_model_folder, saved_folder
from bruno_ray.publishing import hub
from bruno_ray.runs.directory import RunDirectory

logger = logging.getLogger(__name__)


def publish_run(
    run: RunDirectory, trial: int | None, repo: str, public: bool = False, dry_run: bool = False
) -> hub.Plan | None:
    """What would be sent of a trial (the selected one, if none is named), which is saved first where it is not yet.

    Login and repository are looked at before that. With ``dry_run`` nothing is saved, and None says that it would be.
    Raises OutputError as ``hub.check`` and ``hub.plan``, and whatever saving does.
    """
    record = run.read()
    if trial is None:
        if record.selected is None:
            raise OutputError(f"no trial of {run.name} is selected: name one, such as {run.name}:0")
        trial = record.selected.number
    repository = hub.check(repo, private=not public)
    folder = saved_folder(run, trial)
    if folder is None:
        if dry_run:
            return None
        folder = free_model_folder(run, trial)
        if folder is None:
            raise OutputError(f"no free folder for it: save it with `bruno-ray save {run.name}:{trial} --to FOLDER`")
        logger.info("trial %d is not saved yet: saving it to %s", trial, folder)
        commands.save(run.path, trial=trial, to=folder)
    return hub.plan(folder, repository)
