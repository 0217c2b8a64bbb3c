"""Every use of names that Optuna keeps private, so that an upgrade of Optuna breaks in one file.

Each function says what is missing in Optuna's public interface and what would replace it. ``tests/test_internals.py``
has a test for each; pyproject.toml bounds Optuna above. Optuna is imported in the functions: this module costs nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import TPESampler
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy
    from optuna.trial import FrozenTrial


def storage_of(study: "optuna.Study") -> "BaseStorage":
    """The storage as the study uses it, with Optuna's cache around a database.

    The storage that was given to ``create_study`` would be stale beside that cache. A public ``Study.storage`` would
    replace this.
    """
    return study._storage


def journal_backend(storage: "BaseStorage") -> Any:
    """The backend that a JournalStorage was made with; None for other storages.

    A study's storage is all that reaches the places that hold writes together. A public ``JournalStorage.backend``
    would replace this.
    """
    return getattr(storage, "_backend", None)


def set_trial_attribute(study: "optuna.Study", number: int, name: str, value: Any) -> None:
    """Set a user attribute of an unfinished trial by its number.

    Optuna sets them through a ``Trial``, which only the process that asked for it has. A public
    ``Study.set_trial_user_attr(number, ...)`` would replace this.
    """
    storage = study._storage
    trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    storage.set_trial_user_attr(trial_id, name, value)


def unfinished_trial(study: "optuna.Study", trial: "FrozenTrial") -> "optuna.Trial":
    """A handle with which to go on sampling a trial that another process has asked for.

    A public way from a RUNNING ``FrozenTrial`` back to its ``Trial`` would replace this.
    """
    import optuna

    return optuna.Trial(study, trial._trial_id)


def seed_sampler(sampler: "TPESampler", key: Sequence[int]) -> None:
    """Make the sampler's next draws depend on ``key`` alone.

    ``reseed_rng`` takes no seed. A public one that does would replace this.
    """
    import numpy as np

    state = np.random.SeedSequence(key).generate_state(8)
    sampler._rng.rng.seed(state)
    sampler._random_sampler._rng.rng.seed(state)


def kept_gp_params(trial: "FrozenTrial") -> dict[str, Any]:
    """The parameters that a ``GPSampler`` has noted with a trial it sampled; empty if it has not.

    It notes them so that other processes count the trial among those under way. A public reader would replace this.
    """
    from optuna.samplers._gp.sampler import _get_params

    return {name: value for name, value in _get_params(trial).items() if name not in trial.params}


def study_id_of(study: "FrozenStudy") -> int:
    """The id of a ``FrozenStudy``, which ``BaseStorage.get_all_studies`` returns, by which storages find a study.

    A public ``FrozenStudy.study_id`` would replace this.
    """
    return study._study_id
