"""Whether a study trains edits: as the settings say, or what its search pays for. Said before anything is computed."""

import logging

from bruno_ray.errors import ModelError, SettingsError
from bruno_ray.prompts.sets import Prompts
from bruno_ray.runs.records import today
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import Settings
from bruno_ray.study.trainings import affordable, versions
from bruno_ray.workers.pool import WorkerPool

logger = logging.getLogger(__name__)

FEWEST_ANSWERS = 2
"""Desired answers to different prompts: what one of them says is not what they have in common."""


def decide_method(settings: Settings, prompts: Prompts, pool: WorkerPool) -> Settings:
    """The settings with a method in place of `auto`, and what would stop a training is said before the search.

    Raises:
        SettingsError, ModelError: as ``require_trainable``, where the settings ask for trained edits by name.
    """
    study = settings.study
    if study.method != "auto":
        if study.method != "searched":
            require_trainable(settings, prompts, pool)
        return settings
    n_prompts = len(prompts.target.validation) + len(prompts.baseline.validation)
    found, trials = affordable(settings, n_prompts, any(prompt.answer for prompt in prompts.target.train)), 0
    try:
        if study.sampler != "tpe":
            reason = f"study.sampler is {study.sampler}"
        elif not found.trials:
            reason = f"one training would cost as much as some {found.searched_trials:.0f} searched trials"
        else:
            require_trainable(settings, prompts, pool)
            trials, reason = found.trials, ""
    except (SettingsError, ModelError) as error:
        reason = str(error)
    if trials:
        logger.info(
            "study.method auto: the last %d of %d trials are trained by gradient, %d to a training, which costs about"
            " as much as %.0f searched ones",
            *(trials, study.n_trials, min(trials, versions(settings.learned)), found.searched_trials),
        )
    else:
        logger.info("study.method auto: no edit is trained, %s; `--method both` asks for it", reason)
    learned = settings.learned.model_copy(update={"trials": trials or settings.learned.trials})
    study = study.model_copy(update={"method": "both" if trials else "searched"})
    return settings.model_copy(update={"study": study, "learned": learned})


def require_trainable(settings: Settings, prompts: Prompts, pool: WorkerPool) -> None:
    """What would stop a training is said before the search.

    Raises:
        SettingsError: a desired answer shows the behaviour, or there is only one.
        ModelError: the model's kernels give no gradient, a weight that the norm mode asks for cannot be read, or memory
            does not suffice for one text.
    """
    markers = Markers(settings.scoring.markers, settings.scoring.empty_counts)
    answered = {prompt.user: prompt.answer for prompt in prompts.target.train if prompt.answer}
    for asked, answer in answered.items():
        if markers.shown_by(answer):
            raise SettingsError(
                f"the desired answer to {asked!r} shows the behaviour (it holds a marker): correct it in the"
                " answer_column of prompts.target.train"
            )
    if 0 < len(answered) < FEWEST_ANSWERS:
        raise SettingsError(
            f"only {len(answered)} prompt of prompts.target.train has a desired answer: give 4 or more of them, or"
            " leave answer_column out"
        )
    longest = max(prompts.target.train, key=lambda prompt: len(prompt.user))
    pool.call("require_gradient", [longest], today(), settings.learned, settings.scoring.response_tokens)
