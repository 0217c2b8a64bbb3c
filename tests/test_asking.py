"""Questions to a person: an empty answer, the end of the input and Ctrl-C at each, through the real commands."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bruno_ray.runs.directory import RunDirectory
from tests.support.pseudo_terminal import CTRL_C, CTRL_D, ENTER, AtTerminal, environment
from tests.support.waiting import wait_for

pytest_plugins = ["tests.support.local_ray"]

COMMAND = ("-m", "bruno_ray.cli.main")
SAVE, TALK = "Which trial shall be saved?", "Which trial do you want to talk to?"


@pytest.fixture
def at_terminal() -> Callable[..., AtTerminal]:
    started = []

    def start(*arguments: str, cwd: Path, **variables: str) -> AtTerminal:
        started.append(AtTerminal(arguments, cwd, **variables))
        return started[-1]

    yield start
    for terminal in started:
        if terminal.process.poll() is None:
            for child in psutil.Process(terminal.process.pid).children(recursive=True):
                child.kill()
            terminal.process.kill()


def command_of_a_run(organism: Path, folder: Path, name: str, trials: int = 4) -> list[str]:
    return [
        *(*COMMAND, "run", str(organism / "model"), "--behaviour", "organism", "--study-name", name),
        *("--trials", str(trials), "--study.n-startup-trials", "2", "--study.trials-per-batch", "2"),
        *("--prompts.n-train", "20", "--prompts.n-validation", "6", "--prompts.n-test", "6"),
        *("--output.directory", str(folder), "--residuals.cache-dir", str(folder / "residuals")),
        *("--ray.object-store-memory", "100000000"),
    ]


@pytest.fixture(scope="module")
def searched(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, str]:
    """A run of a few trials that was left by Ctrl-C at its question, and what it wrote until then."""
    folder = tmp_path_factory.mktemp("asking")
    command = command_of_a_run(organism, folder, "asked")
    terminal = AtTerminal(command, folder)
    try:
        terminal.wait_for_text(SAVE)
        assert (folder / "asked" / "report.html").is_file(), "the report is there before anybody is asked"
        names = [child.name() for child in psutil.Process(terminal.process.pid).children(recursive=True)]
        assert not [name for name in names if "ray" in name or "gcs" in name], "workers and Ray are gone"
        terminal.type(CTRL_C)
        assert terminal.exit_code() == 130
    finally:
        terminal.process.kill()
    return RunDirectory.open(folder / "asked"), terminal.text


def state_of(run: RunDirectory) -> dict[str, bytes]:
    return {str(file.relative_to(run.path)): file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_left_at_its_question_is_whole(searched: tuple[RunDirectory, str]) -> None:
    run, text = searched
    assert "Traceback" not in text and text.rstrip().endswith("interrupted")
    record = run.read()
    assert record.n_trials == {"COMPLETE": 4} and record.selected is None
    assert not list(run.path.rglob("*.partial-*")) and json.loads(run.run_file.read_text())


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_left_early_says_how_to_go_on(
    organism: Path, tmp_path: Path, at_terminal: Callable[..., AtTerminal]
) -> None:
    endless = 5_000  # trials: however late Ctrl-C comes, the run has not got to its question
    terminal = at_terminal(*command_of_a_run(organism, tmp_path, "left", endless), cwd=tmp_path)
    wait_for(lambda: (tmp_path / "left" / "run.json").is_file(), "the run has begun", 300)
    terminal.type(CTRL_C)
    assert terminal.exit_code() == 130, terminal.text
    last = " ".join(terminal.text.split()).rpartition("interrupted: ")[2]
    assert last == f"`bruno-ray resume {tmp_path / 'left'}` continues it" and "Traceback" not in terminal.text
    again = at_terminal(*COMMAND, "resume", str(tmp_path / "left"), "--trials", "4", "--auto-select", cwd=tmp_path)
    assert again.exit_code() == 0, again.text
    record = RunDirectory.open(tmp_path / "left").read()
    assert record.n_trials["COMPLETE"] >= 4 and record.selected is not None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "question", "keys", "hint"),
    [("save", SAVE, CTRL_D, "`bruno-ray save asked --trial N`"), ("chat", TALK, ENTER, "asked:TRIAL")],
)
def test_no_answer_is_an_answer(
    searched: tuple[RunDirectory, str],
    at_terminal: Callable[..., AtTerminal],
    command: str,
    question: str,
    keys: str,
    hint: str,
) -> None:
    run, _ = searched
    before = state_of(run)
    terminal = at_terminal(*COMMAND, command, str(run.path), cwd=run.path.parent)
    terminal.wait_for_text(question)
    terminal.type(keys)
    assert terminal.exit_code() == 2, terminal.text
    assert "Traceback" not in terminal.text
    last = terminal.text.strip().splitlines()[-1]
    assert "error: no trial was chosen" in last and hint in last
    assert state_of(run) == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("command", "how"), [("save", "<&-"), ("chat", "</dev/null")])
def test_without_a_terminal_nobody_is_asked(searched: tuple[RunDirectory, str], command: str, how: str) -> None:
    run, _ = searched
    line = f'exec "{sys.executable}" -m bruno_ray.cli.main {command} "{run.path}" {how}'
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environment(), cwd=run.path.parent, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: no trial was chosen")


@pytest.mark.ray
@pytest.mark.slow
def test_a_resumed_run_asks_again_and_saves_what_is_picked(
    searched: tuple[RunDirectory, str], at_terminal: Callable[..., AtTerminal], joining: dict[str, str]
) -> None:
    """After the question workers are started anew for the trial's test and for measuring what was saved."""
    run, _ = searched
    there = {"cwd": run.path.parent, **joining}
    terminal = at_terminal(*COMMAND, "resume", str(run.path), **there)
    terminal.wait_for_text(SAVE)
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0, terminal.text
    assert f"`bruno-ray save {run.name}`" in terminal.text and run.read().selected is None

    terminal = at_terminal(*COMMAND, "save", str(run.path), **there)
    terminal.wait_for_text(SAVE)
    terminal.type(f"3{ENTER}")
    assert terminal.exit_code() == 0, terminal.text
    selected = run.read().selected
    assert selected.number == 3 and selected.test is not None and selected.saved is not None
    assert json.loads((run.model_folder / "bruno.json").read_text())["trial"] == 3

    terminal = at_terminal(*COMMAND, "resume", str(run.path), **there)
    terminal.wait_for_text(SAVE)
    terminal.type(f"1{ENTER}")
    assert terminal.exit_code() == 0, terminal.text
    selected = run.read().selected
    assert selected.number == 1 and Path(selected.saved_path).name == "model-1"
    assert "Trial 1 was selected" in run.report_file.read_text(encoding="utf-8")


@pytest.mark.ray
@pytest.mark.slow
def test_a_table_in_a_pipe_has_a_line_per_row(searched: tuple[RunDirectory, str]) -> None:
    run, _ = searched
    command = [sys.executable, *COMMAND, "front", "--all", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(COLUMNS="40"), timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "difference_in_means@0" in line]
    assert len(rows) == 4
    assert all("; attention " in row and ", mlp " in row for row in rows)
    assert max(map(len, done.stdout.splitlines())) < 200


NUMBER = """
from bruno_ray.cli.exits import exit_code
from bruno_ray.terminal import ask_number
raise SystemExit(exit_code(lambda: print("picked", ask_number("Which?", [3, 12]))))
"""


@pytest.mark.parametrize(
    ("keys", "code", "last"),
    [
        (ENTER, 0, "picked None"),
        (CTRL_D, 0, "picked None"),
        (CTRL_C, 130, "interrupted"),
        (f"12{ENTER}", 0, "picked 12"),
        (f"99{ENTER}x{ENTER} 3 {ENTER}", 0, "picked 3"),
        (f"99{ENTER}{ENTER}", 0, "picked None"),
        (f"99{ENTER}{CTRL_D}", 0, "picked None"),
    ],
)
def test_a_number_is_asked_for_until_it_is_one_or_there_is_none(
    at_terminal: Callable[..., AtTerminal], tmp_path: Path, keys: str, code: int, last: str
) -> None:
    terminal = at_terminal("-c", NUMBER, cwd=tmp_path)
    terminal.wait_for_text("Which?")
    terminal.type(keys)
    assert terminal.exit_code() == code
    assert terminal.text.strip().endswith(last)


AGREE = """
from bruno_ray.cli.exits import exit_code
from cluster.cli.asking import agree
raise SystemExit(exit_code(lambda: agree("Rent a machine?", yes=False)))
"""


@pytest.mark.parametrize(
    ("keys", "code", "last"),
    [
        (ENTER, 2, "error: nothing was done: it was not agreed to"),
        (CTRL_D, 2, "error: nothing was done: it was not agreed to"),
        (f"n{ENTER}", 2, "error: nothing was done: it was not agreed to"),
        (CTRL_C, 130, "interrupted"),
        (f"y{ENTER}", 0, None),
    ],
)
def test_what_costs_needs_a_yes(
    at_terminal: Callable[..., AtTerminal], tmp_path: Path, keys: str, code: int, last: str | None
) -> None:
    terminal = at_terminal("-c", AGREE, cwd=tmp_path)
    terminal.wait_for_text("Rent a machine?")
    terminal.type(keys)
    assert terminal.exit_code() == code
    assert last is None or terminal.text.strip().endswith(last)


def test_nothing_that_costs_is_done_where_nobody_can_say_yes(tmp_path: Path) -> None:
    for how in ("<&-", "</dev/null"):
        line = f'exec "{sys.executable}" -c "$CODE" {how}'
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, env=environment(CODE=AGREE), cwd=tmp_path
        )
        assert done.returncode == 2 and "add --yes" in done.stderr and "Traceback" not in done.stderr
