"""A view of an Optuna storage that holds one study, names its objectives and takes no writes."""

from collections.abc import Container, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NoReturn

from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bruno_ray.errors import StudyError
from bruno_ray.optuna_internals import study_id_of

if TYPE_CHECKING:
    from bruno_ray.optuna_internals import FrozenStudy

METRIC_NAMES = "study:metric_names"
"""Where `Study.set_metric_names` keeps them."""


class OneStudy(BaseStorage):
    """The study called ``name`` in ``storage``, as long as that is only looked at.

    Args:
        objectives: shown as the names of the study's values, without being written to it.

    Raises:
        StudyError: there is no such study, or something tries to write.
    """

    def __init__(self, storage: BaseStorage, name: str, objectives: Sequence[str]):
        self._storage = storage
        self._objectives = list(objectives)
        try:
            self.study_id = storage.get_study_id_from_name(name)
        except KeyError as error:
            raise StudyError(f"the storage has no study {name!r}: check study.name and study.storage") from error

    def _own(self, study_id: int) -> int:
        if study_id != self.study_id:
            raise KeyError(study_id)  # what Optuna's storages raise for a study they do not have
        return study_id

    def _write(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise StudyError("this study is shown read only: use `bruno-ray resume` to continue it")

    create_new_study = create_new_trial = delete_study = _write
    set_study_user_attr = set_study_system_attr = _write
    set_trial_param = set_trial_state_values = set_trial_intermediate_value = _write
    set_trial_user_attr = set_trial_system_attr = _write

    def get_all_studies(self) -> "list[FrozenStudy]":
        studies = [copy(study) for study in self._storage.get_all_studies() if study_id_of(study) == self.study_id]
        for study in studies:
            study.system_attrs = {**study.system_attrs, METRIC_NAMES: self._objectives}
        return studies

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._own(self._storage.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._storage.get_study_name_from_id(self._own(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._storage.get_study_directions(self._own(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(self._own(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return {**self._storage.get_study_system_attrs(self._own(study_id)), METRIC_NAMES: self._objectives}

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._storage.get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._own(study_id), deepcopy, states)
