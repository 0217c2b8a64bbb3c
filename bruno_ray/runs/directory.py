"""The run directory: all that one run leaves behind, each file written whole or not at all.

    RUN/
      run.json                 RunRecord: settings, versions, hashes, seeds, timings, scores, the selected trial
      study.journal            the Optuna study, unless `study.storage` names another place
      directions.safetensors   the DirectionBank that the search chooses from
      learned/                 trained direction sets, each in a file named by a hash of its content
      geometry.json            how target and baseline residuals lie, for the report
      samples.json             answers before and after, for the report and the card
      test_prompts.json        the test prompts, in the order of the scores' rows
      readings.json            all whole answers to target prompts, and who takes which for the behaviour
      reproduce.json           what it takes to measure the selected trial again
      cost.json                what rented machines have cost for it so far; on a cluster only
      report.html              the report
      model/                   the saved model, once a trial has been saved

A file is written beside its final name and renamed over it, a folder likewise, so a full disk or a killed process
leaves the previous state. run.json is changed by several commands at a time (`save` while the search goes on): whoever
changes it holds a lock from reading to writing. Importable without torch.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError

from bruno_ray.ablation.plan import PREFIX
from bruno_ray.errors import OutputError
from bruno_ray.files import REASONS, atomic_file, locked, output_errors, require_free_space, write_json
from bruno_ray.runs.records import SCHEMA_VERSION, CostRecord, Readings, RunRecord, Sample, TestPrompt, first_mistake

if TYPE_CHECKING:
    import numpy as np

    from bruno_ray.ablation.closed_forms import DirectionBank


RUN_FILE = "run.json"


def refuse_existing(path: Path) -> None:
    """Raise OutputError if a new run would write into something at ``path``, or may not write there."""
    if path.exists() and (not path.is_dir() or any(child.name != f".{RUN_FILE}.lock" for child in path.iterdir())):
        run = (path / "run.json").exists()
        advice = "`bruno-ray resume` continues it, --study-name starts another" if run else "choose another name"
        raise OutputError(f"{path} exists already: {advice}")
    above = path.absolute()
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK):
        reason = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
        raise OutputError(f"cannot write {path}: {REASONS[reason]}")


class RunDirectory:
    """One run on disk. Make it with `create`, `open` or `find`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file = path / RUN_FILE
        self.journal_file = path / "study.journal"
        self.directions_file = path / "directions.safetensors"
        self.learned_folder = path / "learned"
        self.geometry_file = path / "geometry.json"
        self.samples_file = path / "samples.json"
        self.test_prompts_file = path / "test_prompts.json"
        self.readings_file = path / "readings.json"
        self.cost_file = path / "cost.json"
        self.report_file = path / "report.html"
        self.model_folder = path / "model"

    @classmethod
    def create(cls, path: Path, record: RunRecord, resume: bool = False) -> "RunDirectory":
        """Make the folder and its run.json. With ``resume``, an existing run is opened as it is instead.

        Raises:
            OutputError: the folder holds something already, or cannot be written.
        """
        path = Path(path).absolute()
        run = cls(path)
        if run.run_file.is_file() and resume:
            return cls.open(path)
        with output_errors(path):
            refuse_existing(path)
            path.mkdir(parents=True, exist_ok=True)
        with locked(run.run_file):
            refuse_existing(path)  # another process may have begun this run in the meantime
            run.write(record)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run, its run.json read and checked once."""
        run = cls(Path(path).absolute())
        run.read()
        return run

    @classmethod
    def find(cls, name_or_path: str | Path, output_directory: Path) -> "RunDirectory":
        """A run given by its folder, or by its name under ``output_directory``."""
        for place in (Path(name_or_path), output_directory / name_or_path):
            if (place / "run.json").is_file():
                return cls.open(place)
        known = sorted(p.parent.name for p in output_directory.glob("*/run.json"))
        there = f"runs in {output_directory}: {', '.join(known)}" if known else f"no runs in {output_directory}"
        raise OutputError(f"no run called {name_or_path}: give its folder or its name ({there})")

    @property
    def name(self) -> str:
        return self.path.name

    def read(self) -> RunRecord:
        """Raises OutputError if run.json is missing, damaged or of another version."""
        self._require_run_file()
        try:
            data = json.loads(self.run_file.read_text(encoding="utf-8"))
            version = data["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.run_file} is damaged: restore it from a copy, or start the run again under another name"
            ) from error
        if version != SCHEMA_VERSION:
            raise OutputError(
                f"{self.run_file} has schema {version} and this bruno-ray reads {SCHEMA_VERSION}: use the version"
                f" that wrote it ({data.get('versions', {}).get('bruno-ray', 'unknown')})"
            )
        try:
            return RunRecord.model_validate(data)
        except ValidationError as error:
            raise OutputError(
                f"{self.run_file} does not fit this version of bruno-ray ({first_mistake(error)}): use the version"
                f" that wrote it ({data.get('versions', {}).get('bruno-ray', 'unknown')})"
            ) from error

    def _require_run_file(self) -> None:
        if not self.run_file.is_file():
            raise OutputError(f"{self.path} is not a run directory (it has no run.json): give a run's folder or name")

    def write(self, record: RunRecord) -> None:
        """Replace run.json as a whole; to change it, see `change`."""
        write_json(self.run_file, record.model_dump(mode="json"))

    def update(self, **fields: Any) -> RunRecord:
        """Replace fields of run.json; mappings are merged key by key. Returns the new record."""
        return self.change(
            lambda record: {
                name: {**getattr(record, name), **value} if isinstance(value, Mapping) else value
                for name, value in fields.items()
            }
        )

    def change(self, change: Callable[[RunRecord], Mapping[str, Any]]) -> RunRecord:
        """Replace the fields that ``change`` makes of the record as it is at that moment; returns the new record.

        Other processes wait meanwhile, so what they have written is kept.
        """
        self._require_run_file()  # a lock would make the folder
        with locked(self.run_file):
            record = self.read()
            # Validated again, since model_copy alone would take anything.
            record = RunRecord.model_validate({**dict(record), **change(record)})
            self.write(record)
        return record

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage of the pipeline has taken so far."""

        def added(record: RunRecord) -> dict[str, Any]:
            return {"timings": {**record.timings, stage: round(record.timings.get(stage, 0.0) + seconds, 3)}}

        self.change(added)

    def save_directions(self, bank: "DirectionBank") -> None:
        """Write the direction bank: name -> (n_layers+1, rank, d_model) float32."""
        from safetensors.torch import save_file

        require_free_space(self.path, sum(t.numel() * t.element_size() for t in bank.values()), "the directions")
        with output_errors(self.directions_file), atomic_file(self.directions_file) as aside:
            save_file(
                {name: tensor.contiguous() for name, tensor in bank.items()},
                aside,
                metadata={"axes": "point rank d_model"},  # several entries are written in an order by chance
            )

    def load_bank(self) -> "DirectionBank":
        """The direction bank that the search chooses from, on CPU.

        Raises OutputError if the run has none yet or the file is damaged.
        """
        if not self.directions_file.is_file():
            raise OutputError(f"{self.path} has no directions yet: continue it with `bruno-ray resume {self.name}`")
        return _load_tensors(self.directions_file)

    def load_directions(self) -> "DirectionBank":
        """The bank, and what was trained beside it: whatever an edit of this run may name. Raises as `load_bank`."""
        bank = self.load_bank()
        for file in sorted(self.learned_folder.glob("*.safetensors")):
            bank |= _load_tensors(file)
        return bank

    def file_of_directions(self, name: str) -> Path:
        """Where the direction set of that name lies: a trained one has a file of its own."""
        return self.learned_folder / f"{name}.safetensors" if name.startswith(PREFIX) else self.directions_file

    def save_learned(self, name: str, directions: "np.ndarray") -> None:
        """Write a trained direction set, (n_layers + 1, rank, d_model) float32. Its name is a hash of its content."""
        from safetensors.numpy import save_file

        file = self.file_of_directions(name)
        if file.exists():
            return
        self.learned_folder.mkdir(exist_ok=True)
        with output_errors(file), atomic_file(file) as aside:
            save_file({name: directions}, aside, metadata={"axes": "point rank d_model"})

    def save_samples(self, samples: Sequence[Sample]) -> None:
        write_json(self.samples_file, [sample.model_dump(exclude_none=True) for sample in samples])

    def save_test_prompts(self, prompts: Sequence[TestPrompt]) -> None:
        write_json(self.test_prompts_file, [prompt.model_dump(exclude_none=True) for prompt in prompts])

    def load_test_prompts(self) -> list[TestPrompt]:
        """Those of the last time a trial was tested; none before."""
        return [TestPrompt(**entry) for entry in self._read_json(self.test_prompts_file) or []]

    def load_samples(self) -> list[Sample]:
        """Empty where none were saved."""
        content = self._read_json(self.samples_file)
        try:
            return [Sample.model_validate(sample) for sample in content or []]
        except (TypeError, ValidationError) as error:
            raise OutputError(f"{self.samples_file} is damaged: delete it and resume the run") from error

    def save_readings(self, readings: Readings) -> None:
        write_json(self.readings_file, readings.model_dump())

    def load_readings(self) -> Readings | None:
        """None where none were saved."""
        content = self._read_json(self.readings_file)
        try:
            return None if content is None else Readings.model_validate(content)
        except ValidationError as error:
            raise OutputError(f"{self.readings_file} is damaged: delete it and resume the run") from error

    def save_geometry(self, geometry: dict[str, Any]) -> None:
        """What `plots.geometry_record` makes."""
        write_json(self.geometry_file, geometry)

    def save_cost(self, cost: CostRecord) -> None:
        write_json(self.cost_file, cost.model_dump(mode="json"))

    def load_cost(self) -> CostRecord | None:
        """None where no account was kept. Raises OutputError if it is damaged."""
        content = self._read_json(self.cost_file)
        try:
            return None if content is None else CostRecord.model_validate(content)
        except ValidationError as error:
            raise OutputError(f"{self.cost_file} is damaged: remove it, the run does not need it") from error

    def load_geometry(self) -> dict[str, Any] | None:
        """None where none was saved."""
        return self._read_json(self.geometry_file)

    def _read_json(self, file: Path) -> Any | None:
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{file} is damaged: delete it and resume the run") from error


def _load_tensors(file: Path) -> "DirectionBank":
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise OutputError(f"{file} is damaged: delete it and resume the run") from error
