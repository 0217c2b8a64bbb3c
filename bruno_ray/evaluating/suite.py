"""Suites of lm-eval tasks: those of this package by name, a TOML file, or a folder of tasks.

    # mine.toml
    include = "tasks"               # folder with tasks of one's own, relative to this file
    [[task]]
    name = "arithmetic"             # as lm-eval knows it
    metric = "acc"                  # what is compared; without it, the first of METRICS that the task has
    fewshot = 5                     # examples before each question; without it, as the task says
    limit = 200                     # questions; without it, all
    chat_template = true            # ask through the model's chat template

A folder is a suite of all tasks in it (https://github.com/EleutherAI/lm-evaluation-harness, docs/new_task_guide.md).
"""

import hashlib
import re
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bruno_ray.errors import SettingsError, first_line
from bruno_ray.files import expanded, file_chunks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # ty: ignore[import-not-found]

SUITES = Path(__file__).parent / "suites"
TASK_NAME = re.compile(r"^task:[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)


class Task(BaseModel):
    """One task, and how it is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$")
    metric: str | None = None
    """`acc`, or with lm-eval's filter `exact_match,strict-match`; None takes the first that is known."""

    fewshot: int | None = Field(None, ge=0)
    limit: int | None = Field(None, gt=0)
    chat_template: bool = False


class Suite(BaseModel):
    """Tasks that are run together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    include: Path | None = None
    """Folder with tasks that lm-eval does not bring, in full."""

    task: tuple[Task, ...] = Field(min_length=1)

    def digest(self) -> str:
        """A hash of what lies in ``include``: a task that was changed is run again."""
        digest = hashlib.sha256()
        if self.include is not None:
            for file in sorted(self.include.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    digest.update(str(file.relative_to(self.include)).encode())
                    for chunk in file_chunks(file, whole=True):
                        digest.update(chunk)
        return digest.hexdigest()


def named_suites() -> list[str]:
    return sorted(file.stem for file in SUITES.glob("*.toml"))


def load_suite(reference: str) -> Suite:
    """A suite of this package by name, or that of a file or folder. Raises SettingsError."""
    if reference in named_suites():
        return _read(SUITES / f"{reference}.toml")
    path = expanded(reference).absolute()
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _read(path)
    raise SettingsError(
        f"--suite: no suite {reference!r}: give {', '.join(named_suites())}, a TOML file, or a folder of lm-eval tasks"
    )


def _read(file: Path) -> Suite:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        if "include" in data:
            data["include"] = (file.parent / expanded(str(data["include"]))).resolve()
        suite = Suite.model_validate({"name": file.stem, **data})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"--suite: {file} is not a TOML file ({first_line(error)}): correct it") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise SettingsError(f"--suite: {file}, {place}: {first['msg']}; see docs/evaluations.md") from error
    if suite.include is not None and not suite.include.is_dir():
        raise SettingsError(f"--suite: {file}: there is no folder {suite.include}: correct `include`")
    return suite


def _of_folder(folder: Path) -> Suite:
    files = sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")])
    names = [name for file in files for name in TASK_NAME.findall(file.read_text(encoding="utf-8"))]
    if not names:
        raise SettingsError(f"--suite: {folder} has no task (a .yaml file with `task: NAME`): give another folder")
    return Suite(name=folder.name, include=folder.resolve(), task=tuple(Task(name=name) for name in names))
