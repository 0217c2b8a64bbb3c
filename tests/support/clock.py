"""Another day: the clock that chat templates ask, moved in this process or in every worker of a run."""

import datetime
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils

IN_EVERY_PROCESS = '''
"""Python runs this at its start. Templates are told the time of a file, read each time they ask."""
import importlib.abc, importlib.util, sys

NAME = "transformers.utils.chat_template_utils"


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            real = module.datetime

            class Moved(real):
                @classmethod
                def now(cls, tz=None):
                    return real.fromisoformat(open({file!r}).read())

            module.datetime = Moved

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


def move_clock(monkeypatch: pytest.MonkeyPatch, now: datetime.datetime) -> None:
    """From now on `strftime_now` in a template of this process is told that it is ``now``."""

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return now

    monkeypatch.setattr(chat_template_utils, "datetime", Moved)


class WorkersClock:
    """The clock of templates in every process that is started from here, and of the run's own date in this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._monkeypatch = monkeypatch
        self._file = folder / "now"
        (folder / "sitecustomize.py").write_text(IN_EVERY_PROCESS.replace("{file!r}", repr(str(self._file))))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    def set(self, day: datetime.date) -> None:
        from bruno_ray.runs import records

        now = datetime.datetime.combine(day, datetime.time(12))
        self._file.write_text(now.isoformat())
        move_clock(self._monkeypatch, now)

        class Today(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return day

        self._monkeypatch.setattr(records, "datetime", SimpleNamespace(date=Today))
