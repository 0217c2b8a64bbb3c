"""One run as serving needs it: its study read again when it has changed, its directions. No torch, no Ray."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bruno_ray.ablation.edit import sets_of
from bruno_ray.errors import BrunoError, OutputError
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, SelectedRecord
from bruno_ray.settings import ModelSettings
from bruno_ray.study.selection import TrialRecord, load_trials, pareto_front
from bruno_ray.study.storage import load_study

logger = logging.getLogger(__name__)

DATABASE_SECONDS = 10.0
"""A study in a database is asked for news no more often than that."""


class ServedRun:
    """Make it with ``open``. What was read last is kept: the run may be out of reach for a while."""

    def __init__(self, directory: RunDirectory, record: RunRecord) -> None:
        self.directory = directory
        self.name = directory.name
        self.record = record
        self.trials: list[TrialRecord] = []
        self._stamp: tuple[float, ...] = ()

    @classmethod
    def open(cls, directory: RunDirectory) -> "ServedRun":
        """Raises OutputError or StudyError for a run without directions or study, or with damaged ones."""
        run = cls(directory, directory.read())
        run.trials = run._read_trials()
        if not directory.directions_file.is_file():
            raise OutputError(f"{directory.path} has no directions yet: continue it with `bruno-ray resume`.")
        used: dict[Path, set[str]] = {directory.directions_file: set()}
        for trial in run.trials:
            if trial.edit:
                for name in sets_of(trial.edit):
                    used.setdefault(directory.file_of_directions(name), set()).add(name)
        for path, names in used.items():
            try:
                with safe_open(path, framework="numpy") as file:
                    missing = names - set(file.keys())
            except (SafetensorError, OSError) as error:
                raise OutputError(f"{path} is damaged: delete it and resume the run.") from error
            if missing:
                raise OutputError(f"{path} lacks {', '.join(sorted(missing))}: resume the run.")
        run._stamp = run._changes()
        return run

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def model(self) -> ModelSettings:
        return self.record.settings.model

    @property
    def selected(self) -> SelectedRecord | None:
        return self.record.selected

    @property
    def created(self) -> int:
        return int(self.directory.directions_file.stat().st_mtime) if self.directory.directions_file.exists() else 0

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.record.settings.scoring.objectives

    def rendering(self) -> dict[str, Any]:
        """How the run's prompts were made."""
        return {
            "system_prompt": self.record.settings.prompts.system_prompt,
            "response_prefix": self.record.response_prefix,
            "date": self.record.date,
        }

    def unedited_metrics(self) -> dict[str, float]:
        scores = self.record.baseline.get("test") or self.record.baseline.get("validation")
        return scores.values if scores else {}

    def front(self) -> list[TrialRecord]:
        return pareto_front(self.trials, self.objectives)

    def trial(self, number: int) -> TrialRecord | None:
        return next((trial for trial in self.trials if trial.number == number and trial.state == "COMPLETE"), None)

    def directions(self, name: str) -> np.ndarray:
        """A direction set, (n_layers + 1, rank, d_model) float32."""
        with safe_open(self.directory.file_of_directions(name), framework="numpy") as file:
            return file.get_tensor(name)

    def refresh(self) -> bool:
        """Read run.json and study again if they have changed. Returns whether they had."""
        try:
            stamp = self._changes()
            if stamp == self._stamp:
                return False
            self.record, self.trials = self.directory.read(), self._read_trials()
        except (BrunoError, OSError) as error:
            logger.warning("run %s cannot be read at the moment and is served as it was: %s", self.name, error)
            return False
        self._stamp = stamp
        return True

    def _read_trials(self) -> list[TrialRecord]:
        study = self.record.settings.study
        return load_trials(load_study(study.storage, self.path, study.name or self.path.name))

    def _changes(self) -> tuple[float, ...]:
        """Differs when something has been written since."""
        storage = self.record.settings.study.storage
        files = [self.directory.run_file]
        stamp: list[float] = []
        if storage is not None and "://" in storage:
            stamp.append(time.monotonic() // DATABASE_SECONDS)
        else:
            files.append(self.directory.journal_file if storage is None else Path(storage))
        for file in files:
            status = file.stat()
            stamp += [status.st_mtime_ns, status.st_size]
        return tuple(stamp)
