"""Commands that other packages bring to `bruno-ray`, found by their entry points."""

import argparse
import sys
from pathlib import Path

import pytest

from bruno_ray.cli import main
from bruno_ray.cli.command import GROUP, Command
from serve.command import require_packages
from serve.settings import ServeArgs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package of one module with the given entry points, as pip would."""

    def installed(module: str, source: str, **entries: str) -> None:
        information = tmp_path / f"{module}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (information / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return installed


GREETING = """
import logging
from bruno_ray.cli.command import Command

def run(arguments):
    logging.getLogger(__name__).info("saying it")
    print("hello", arguments.whom)
    return 3

COMMAND = Command("say hello", run, lambda parser: parser.add_argument("whom"))
"""


def test_a_package_adds_a_command(install, capsys: pytest.CaptureFixture[str]) -> None:
    install("greeting", GREETING, greet="greeting:COMMAND", run="greeting:COMMAND")
    assert main.main(["greet", "you"]) == 3
    assert capsys.readouterr().out == "hello you\n"
    assert main.main(["greet"]) == 2
    assert "whom" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["--help"])
    assert "say hello" in capsys.readouterr().out
    assert main.main(["run"]) == 2, "ours is not taken"


def test_one_that_cannot_be_imported_says_so_and_breaks_no_other(install, capsys: pytest.CaptureFixture[str]) -> None:
    install("broken", "import a_package_that_nobody_has", shine="broken:COMMAND")
    assert main.main(["shine", "--brightly", "7"]) == 2
    error = capsys.readouterr().err
    assert "a_package_that_nobody_has" in error and "pip install 'broken[shine]'" in error
    assert error.count("\n") == 1
    assert main.main(["show-config"]) == 0


def test_ours_are_entry_points_of_pyproject() -> None:
    """Read from the file: the interpreter's metadata may be of another checkout."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"][GROUP]
    assert set(entries) == {"serve", "cluster"}
    for target in entries.values():
        module, _, name = target.partition(":")
        command = getattr(__import__(module, fromlist=[name]), name)
        assert isinstance(command, Command)
        command.add_arguments(argparse.ArgumentParser())


def test_serving_pages_without_their_packages_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from bruno_ray.errors import SettingsError

    require_packages(ServeArgs())
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SettingsError, match=r"gradio.*pip install 'bruno-ray\[serve\]'.*--no-pages"):
        require_packages(ServeArgs())
    require_packages(ServeArgs(pages=False))
