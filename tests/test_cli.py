"""The command line: exit codes, one-line errors, and what each command asks of the pipeline."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bruno_ray.cli import main
from bruno_ray.cli.show_config import documentation
from bruno_ray.errors import ModelError
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import Settings
from bruno_ray.settings.keys import ALIASES, FIELDS, flag_of
from bruno_ray.settings.sources import load


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_directory(empty_directory: Path) -> Path:
    settings = load(["--model.id", "some/model", "--seed", "7"], environ={}).settings
    return RunDirectory.create(empty_directory / "runs" / "mine", RunRecord(settings=settings)).path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the command line calls, bound to the real signatures and not carried out."""
    from bruno_ray.pipeline import commands
    from bruno_ray.pipeline import run as pipeline

    recorded: list[tuple[str, dict[str, Any]]] = []

    def recorder(module: Any, name: str) -> Any:
        signature = inspect.signature(getattr(module, name))

        def record(*args: Any, **kwargs: Any) -> Path:
            bound = signature.bind(*args, **kwargs)
            recorded.append((name, dict(bound.arguments)))
            return Path("result")

        return record

    for name in ("run", "resume"):
        monkeypatch.setattr(pipeline, name, recorder(pipeline, name))
    for name in ("front", "save", "evaluate", "report", "chat", "organism", "coverage"):
        monkeypatch.setattr(commands, name, recorder(commands, name))
    return recorded


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], *parts: str) -> None:
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err, err


def test_mistakes_give_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_directory: Path
) -> None:
    fails(capsys, ["rn"], "'rn'", "did you mean 'run'")
    fails(capsys, ["--foo"], "--foo")
    fails(capsys, ["run"], "no model", "model.id")
    fails(capsys, ["run", "m", "n"], "'n'", "too many")
    fails(capsys, ["run", "m", "--study.n-trails", "5"], "'--study.n-trails'", "'--study.n-trials'")
    fails(capsys, ["run", "m", "--trials", "many"], "--trials", "'many'")
    fails(capsys, ["run", "m", "--model.id", "other"], "--model.id", "given twice")
    fails(capsys, ["run", "m", "--config", "absent.toml"], "absent.toml", "does not exist")
    fails(capsys, ["save", "mine", "--trial", "x"], "--trial", "'x'")
    fails(capsys, ["save", "mine:3", "--auto"], "twice")
    fails(capsys, ["save", "mine", "--public"], "--upload")
    fails(capsys, ["save", "mine", "--tril", "3"], "'--tril'", "'--trial'")
    fails(capsys, ["save"], "RUN")
    fails(capsys, ["resume", "mine", "--trials", "5", "--more", "5"], "not allowed with")
    fails(capsys, ["resume", "mine", "--workers", "0"], "--workers", "'0'")
    fails(capsys, ["resume", "mine", "--study.seed", "3"], "--study.seed")
    fails(capsys, ["report", "other"], "other", "mine")
    fails(capsys, ["front", "mine:3"], "mine:3: this is about a whole run: give mine")
    fails(capsys, ["save", "mine:-1"], "mine:-1: after a colon stands a trial's number, from 0 on")
    fails(capsys, ["run", "m", "--study-name", "mine", "--output.directory", "runs"], "exists already", "resume")
    fails(capsys, ["chat", "mine", "--top-p", "1.5"], "--top-p")
    monkeypatch.setenv("BRUNO_STUDY__SED", "3")
    fails(capsys, ["show-config"], "BRUNO_STUDY__SED", "BRUNO_STUDY__SEED")
    monkeypatch.delenv("BRUNO_STUDY__SED")
    Path("config.toml").write_text("[study]\nn_trails = 3\n")
    fails(capsys, ["run", "m"], "config.toml", "'study.n_trails'", "'study.n_trials'")


def test_errors_of_the_pipeline_interrupts_and_defects(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bruno_ray.pipeline import run as pipeline

    def raising(error: BaseException) -> Any:
        def run(settings: Settings, began: float) -> Path:
            raise error

        return run

    monkeypatch.setattr(pipeline, "run", raising(ModelError("some/model:\n  is not there")))
    fails(capsys, ["run", "some/model"], "error: some/model: is not there\n")
    monkeypatch.setattr(pipeline, "run", raising(KeyboardInterrupt()))
    assert main.main(["run", "some/model"]) == 130
    monkeypatch.setattr(pipeline, "run", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main.main(["run", "some/model"])


def test_what_commands_ask_for(
    calls: list[tuple[str, dict[str, Any]]], run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["run", "--auto-select", "some/model", "--trials", "5"]) == 0
    name, arguments = calls.pop()
    settings = arguments["settings"]
    assert (name, settings.model.id, settings.study.n_trials, settings.selection.auto) == ("run", "some/model", 5, True)
    assert capsys.readouterr().out == "result\n"

    path = {"path": run_directory}
    for argv, expected in [
        (["resume", "mine"], ("resume", {**path, "total": None, "more": None, "overrides": {}})),
        (
            ["resume", str(run_directory), "--more", "5", "--workers", "2"],
            ("resume", {**path, "total": None, "more": 5, "overrides": {"ray": {"workers": "2"}}}),
        ),
        (["front", "mine", "--all"], ("front", {**path, "all_trials": True})),
        (
            ["save", "mine:3", "--to", "there"],
            ("save", {**path, "trial": 3, "auto": False, "to": Path("there"), "upload_to": None, "public": False}),
        ),
        (
            ["save", "mine", "--auto", "--upload", "me/it", "--public"],
            ("save", {**path, "trial": None, "auto": True, "to": None, "upload_to": "me/it", "public": True}),
        ),
        (["report", "mine"], ("report", path)),
        (["organism", "--recipe", "hard"], ("organism", {"recipe": "hard", "to": None})),
    ]:
        assert main.main(argv) == 0, argv
        name, arguments = calls.pop()
        assert isinstance(arguments.pop("began", 0.0), float)  # when the command was started
        assert (name, arguments) == expected
    assert main.main(["chat", "mine:12", "--temperature", "0"]) == 0
    name, arguments = calls.pop()
    assert (name, arguments["trial"]) == ("chat", 12) and arguments["options"]["temperature"] == 0
    assert main.main(["evaluate", "edited", "--base", "some/model"]) == 0
    name, arguments = calls.pop()
    assert (name, arguments["settings"].model.id, arguments["base"]) == ("evaluate", "edited", "some/model")
    assert main.main(["coverage", "some/model"]) == 0
    assert calls.pop()[0] == "coverage"


def test_help_documents_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["run", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key in FIELDS:
        # The six data sets have the same settings; one stands for all.
        if key.startswith("prompts.") and key.count(".") == 3 and not key.startswith("prompts.target.train."):
            continue
        assert f"{flag_of(key)} " in shown
        assert documentation(key)[:20] in shown
    for alias in ALIASES:
        assert f"{alias} " in shown
    assert "[200]" in shown and "[none]" in shown


@pytest.mark.parametrize("command", ["resume", "front", "save", "evaluate", "report", "chat", "organism", "coverage"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"bruno-ray {command}" in capsys.readouterr().out


def test_show_config_names_values_and_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("config.toml").write_text("[study]\nn_trials = 5\n")
    monkeypatch.setenv("BRUNO_STUDY__SEED", "3")
    assert main.main(["show-config", "some/model", "--selection.max-kl", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "study.n_trials = 5  (config.toml)" in lines
    assert "study.seed = 3  (environment BRUNO_STUDY__SEED)" in lines
    assert "selection.max_kl = 0.5  (command line)" in lines
    assert 'model.id = "some/model"  (command line)' in lines
    assert 'prompts.target.train.column = "text"  (preset refusal)' in lines
    assert "study.n_startup_trials = 60  (default)" in lines
    assert main.main(["show-config", "--describe"]) == 0
    assert "# Seeds the sampler:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--behaviour", "organism", "--prompts.system-prompt", 'say "hi"\n\\ caf\u00e9 \U0001f600'],
        ["--prompts.system-prompt", "none", "--model.max-memory", "0=20GiB", "--search.mlp.max-weight", "-1e-5,2"],
        ["--behaviour", "verbosity", "--target", "mine.jsonl", "--prompts.n-test", "3"],
        ["--prompts.baseline.test.source", "mine.jsonl", "--prompts.baseline.test.split", "[:3]"],
        ["--prompts.target.train.column", "none"],
    ],
)
def test_show_config_as_toml_gives_the_same_settings(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for describe in ([], ["--describe"]):
        assert main.main(["show-config", "--toml", *describe, *flags]) == 0
        Path("again.toml").write_text(capsys.readouterr().out, encoding="utf-8")
        assert load(config=Path("again.toml"), environ={}).settings == load(flags, environ={}).settings


OWN_BEHAVIOUR = """
behaviour = "mine"

[model]
id = "google/gemma-3-4b-it"

[prompts.target.train]
source = "prompts/target.jsonl"
column = "prompt"

[prompts.baseline.train]
source = "allenai/c4"
config = "en"
split = "train[:400]"
column = "text"

[scoring]
markers = ["as an ai", "it is important to note"]
"""
"""The file of README.md."""

PRESET = """
[prompts]
system_prompt = "Be brief."
n_test = 7

[prompts.target.train]
source = "target.jsonl"
column = "text"

[prompts.target.test]
source = "target-test.jsonl"
revision = "0123abc"

[prompts.baseline.train]
source = "baseline.jsonl"

[model.max_memory]
0 = "20GiB"
"""


@pytest.mark.parametrize(
    ("config", "environ", "flags"),
    [
        (OWN_BEHAVIOUR, {}, []),
        (OWN_BEHAVIOUR, {"BRUNO_STUDY__SEED": "3", "BRUNO_PROMPTS__TARGET__TRAIN__COLUMN": "none"}, ["--trials", "7"]),
        ("behaviour = 'preset.toml'", {}, []),
        ("behaviour = 'preset.toml'\n[prompts]\nsystem_prompt = 'none'\n", {}, ["--model.max-memory", "none"]),
        ("behaviour = 'preset.toml'\n[prompts.target.test]\nrevision = 'none'\n", {}, []),
        ("behaviour = 'preset.toml'\n[prompts.target.train]\nsource = 'own.jsonl'\n", {}, []),
        ("", {"BRUNO_BEHAVIOUR": "preset.toml", "BRUNO_PROMPTS__SYSTEM_PROMPT": "none"}, []),
        ("", {"BRUNO_BEHAVIOUR": "mine", "BRUNO_PROMPTS__TARGET": '{"train": {"source": "a.txt"}}'}, ["--baseline=b"]),
    ],
)
def test_show_config_as_toml_of_ones_own_files_and_variables(
    config: str,
    environ: dict[str, str],
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("preset.toml").write_text(PRESET)
    Path("config.toml").write_text(config)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main.main(["show-config", "--toml", *flags]) == 0
    Path("again.toml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load(config=Path("again.toml"), environ={}).settings == load(flags).settings


def test_show_config_keeps_a_password_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    storage = "postgresql://me:s3cret@db.example/studies"
    for how in ([], ["--toml"]):
        assert main.main(["show-config", *how, "--storage", storage]) == 0
        shown = capsys.readouterr().out
        assert "s3cret" not in shown and "me:***@db.example" in shown


@pytest.mark.parametrize("config", ["this is no TOML", "[tool.other]\nname = 'another program'\n"])
def test_a_config_file_that_is_not_ours_gets_in_the_way_of_names_only(
    config: str,
    calls: list[tuple[str, dict[str, Any]]],
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("config.toml").write_text(config)
    for path in (str(run_directory), "runs/mine", "./runs/mine"):
        for argv in (["front", path], ["report", path], ["chat", f"{path}:3"], ["save", f"{path}:3"], ["resume", path]):
            assert main.main(argv) == 0, argv
            assert calls.pop()[1]["path"] == run_directory
    capsys.readouterr()
    fails(capsys, ["front", "mine"], "config.toml")
    fails(capsys, ["front", "./runs/yours"], "runs/yours", "no run.json")


def test_a_name_is_looked_up_where_the_settings_say(
    calls: list[tuple[str, dict[str, Any]]], run_directory: Path
) -> None:
    run_directory.parent.rename("elsewhere")
    Path("config.toml").write_text("[output]\ndirectory = 'elsewhere'\n")
    assert main.main(["chat", "mine:3"]) == 0
    _, arguments = calls.pop()
    assert (arguments["path"], arguments["trial"]) == (Path("elsewhere/mine").absolute(), 3)


def test_as_a_program() -> None:
    """Exit codes as a shell sees them; and nothing heavy is imported before a command needs it."""
    base = [sys.executable, "-X", "importtime", "-m", "bruno_ray.cli.main"]
    for argv, code in ((["--version"], 0), (["--help"], 0), (["show-config"], 0), ([], 2), (["run"], 2)):
        done = subprocess.run([*base, *argv], capture_output=True, text=True, timeout=60)
        assert done.returncode == code, (argv, done.stderr[-500:])
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
        assert "bruno_ray.settings" in imported
        assert not imported & {"torch", "ray", "transformers", "datasets", "optuna", "numpy"}


def test_a_reader_that_leaves_early() -> None:
    command = f"{sys.executable} -m bruno_ray.cli.main show-config --describe | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_a_user_without_a_home_gets_the_one_that_containers_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor an entry: Ray raises at its import then."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", "/somewhere")
    assert main.main(["show-config"]) == 0 and os.environ["HOME"] == "/somewhere"
    monkeypatch.setattr(Path, "home", no_home)
    assert main.main(["show-config"]) == 0 and os.environ["HOME"] == "/"
