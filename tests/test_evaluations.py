"""Suites of lm-eval: what is run, what its files say, how base and edit compare, what becomes of it.

With lm-eval itself: serve/test_suites.py.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
import torch

from bruno_ray.cli.main import main
from bruno_ray.errors import OutputError, ServerError, SettingsError
from bruno_ray.evaluating import harness
from bruno_ray.evaluating.own_server import ended_by_sigterm, own_server
from bruno_ray.evaluating.results import compare, read_result
from bruno_ray.evaluating.suite import Suite, Task, load_suite, named_suites
from bruno_ray.files import atomic_directory
from bruno_ray.pipeline import suites
from bruno_ray.publishing import task_table
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import SelectedRecord
from bruno_ray.settings import ModelSettings
from bruno_ray.study.storage import open_storage
from tests.support import finished_run, tiny_models

RECORDED = Path(__file__).parent / "support" / "recorded_lm_eval"
EXAMPLES = Path(__file__).parents[1] / "examples" / "evaluations"


def write_result(
    folder: Path, task: str, values: Sequence[float], metric: str = "acc", groups: Sequence[str] = (), **more: object
) -> None:
    """As lm-eval 0.4.13 writes it; the questions are dealt out to ``groups``, if there are any."""
    place = folder / "model"
    place.mkdir(parents=True)
    mean = sum(values) / len(values)
    figures = {"alias": task, "sample_len": len(values), f"{metric},none": mean, f"{metric}_stderr,none": 0.01, **more}
    results = {"results": {task: figures}, "higher_is_better": {task: {metric: True}}, "lm_eval_version": "0.4.13"}
    (place / "results_2026-01-01T00-00-00.0.json").write_text(json.dumps(results))
    for g, name in enumerate(groups or [task]):
        own = values[g :: len(groups) or 1]
        lines = [json.dumps({"doc_id": i, "filter": "none", metric: value}) for i, value in enumerate(own)]
        (place / f"samples_{name}_2026-01-01T00-00-00.0.jsonl").write_text("\n".join(lines))


# ----- suites -----


def test_the_suites_of_the_package_name_the_public_tasks() -> None:
    assert named_suites() == ["full", "quick"]
    for name in named_suites():
        tasks = {task.name for task in load_suite(name).task}
        assert {"mmlu", "hellaswag", "arc_challenge", "gsm8k", "truthfulqa_mc1", "ifeval"} <= tasks
        assert all(task.metric for task in load_suite(name).task)
    assert not any(task.limit for task in load_suite("full").task)


def test_a_folder_of_tasks_is_a_suite() -> None:
    suite = load_suite(str(EXAMPLES / "tasks"))
    assert [task.name for task in suite.task] == ["local_arithmetic", "local_facts", "local_short_answers"]
    listed = load_suite(str(EXAMPLES / "local.toml"))
    assert listed.include == suite.include and {task.name for task in listed.task} == {t.name for t in suite.task}


def test_the_example_tasks_have_one_right_answer_each() -> None:
    for name in ("arithmetic", "facts"):
        rows = [json.loads(line) for line in (EXAMPLES / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        assert len({row["question"] for row in rows}) == len(rows) == 60
        assert all(len(set(row["choices"])) == 4 for row in rows)
        if name == "arithmetic":
            assert all(eval(row["question"].rstrip("= ")) == int(row["choices"][row["answer"]]) for row in rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[task]]\nname = 'a'\nshots = 3", "task.0.shots"),
        ("[[task]]\nname = 'a b'", "task.0.name"),
        ("include = 'nowhere'\n[[task]]\nname = 'a'", "there is no folder"),
        ("name = 3 [", "is not a TOML file"),
        ("task = []", "task"),
    ],
)
def test_a_suite_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=said):
        load_suite(str(file))


def test_a_changed_task_is_another_one(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "tasks", tmp_path / "tasks")
    before = load_suite(str(tmp_path / "tasks")).digest()
    assert load_suite(str(EXAMPLES / "tasks")).digest() == before, "wherever it lies"
    with (tmp_path / "tasks" / "facts.jsonl").open("a") as file:
        file.write("\n")
    assert load_suite(str(tmp_path / "tasks")).digest() != before


# ----- lm-eval as a program -----


def test_without_lm_eval_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SettingsError, match=r"venv lm-eval && .*pip install 'lm-eval\[api.*--lm-eval"):
        harness.find_lm_eval(None)
    program = tmp_path / "lm-eval"
    with pytest.raises(SettingsError, match="not an executable program"):
        harness.find_lm_eval(program)
    program.touch(0o755)
    assert harness.find_lm_eval(None) == harness.find_lm_eval(program) == program


def test_a_task_is_asked_as_the_suite_says(tmp_path: Path) -> None:
    suite = Suite(name="s", include=tmp_path, task=(Task(name="a", fewshot=3, limit=20, chat_template=True),))
    command = harness.command_of(Path("lm"), suite, suite.task[0], "http://x/v1", "m:trial-3", "base", 512, tmp_path)
    line = " ".join(command)
    assert "--model local-completions --tasks a" in line
    assert "model=m:trial-3,base_url=http://x/v1/completions,tokenizer=base" in line and "max_length=512" in line
    assert f"--include_path {tmp_path}" in line and "--num_fewshot 3 --limit 20 --apply_chat_template" in line
    plain = harness.command_of(Path("lm"), suite, Task(name="a"), "http://x/v1", "m", "base", 512, tmp_path)
    assert not {"--num_fewshot", "--limit", "--apply_chat_template"} & set(plain)


def test_a_program_that_fails_is_one_line_with_its_own_reason() -> None:
    script = (
        "import sys; print('Requesting API:  50%| | 3/6 [00:01', end='\\r', file=sys.stderr); raise OSError('gone')"
    )
    running = harness.Harness([sys.executable, "-c", script], None, "none")
    said: list[str] = []
    with pytest.raises(OutputError, match=r"could not do a \(OSError: gone\): see its log with -v"):
        running.wait("a", said.append)
    assert running.progress == "3/6" and "Traceback" in said[0]


def test_data_may_come_through_a_proxy_and_the_server_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet")
    script = "import os; print(*(os.environ[name] for name in ('HTTPS_PROXY', 'NO_PROXY', 'OPENAI_API_KEY')))"
    running = harness.Harness([sys.executable, "-c", script], None, "none")
    said: list[str] = []
    running.wait("a", said.append)
    assert said == ["http://proxy:3128 intranet,127.0.0.1,localhost none"]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"could not be started: .*nothing-here"),
        own_server([str(tmp_path / "nothing-here")]),
    ):
        pass


def test_sigterm_ends_what_was_started_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    running = None
    with pytest.raises(KeyboardInterrupt), ended_by_sigterm(), ExitStack() as stack:
        aside = stack.enter_context(atomic_directory(tmp_path / "done"))
        (aside / "half").touch()
        running = harness.Harness([sys.executable, "-c", "import time; time.sleep(600)"], None, "none")
        stack.callback(running.stop)
        os.kill(os.getpid(), signal.SIGTERM)
        running.wait("a", print)
    assert running is not None and not running.is_running
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) == before


# ----- what it wrote -----


def test_what_lm_eval_recorded_is_read() -> None:
    """Version 0.4.13, of the organism."""
    found = read_result(RECORDED, Task(name="facts_choice"))
    assert (found.metric, found.filter, found.version, found.higher_is_better) == ("acc", "none", "0.4.13", True)
    assert found.value == pytest.approx(2 / 3) and found.stderr == pytest.approx(1 / 3)
    assert found.rows == {("facts_choice", 0): 0.0, ("facts_choice", 1): 1.0, ("facts_choice", 2): 1.0}


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match=r"facts_choice has no metric f1: name one of acc,none"):
        read_result(RECORDED, Task(name="facts_choice", metric="f1"))


def test_a_pair_is_compared_question_by_question(tmp_path: Path) -> None:
    """By hand: 10 questions, of which the edit loses three and wins one; McNemar's p is 2 * (1 + 4) / 2^4."""
    write_result(tmp_path / "base", "a", [1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    write_result(tmp_path / "edited", "a", [1, 1, 0, 0, 0, 1, 0, 0, 0, 0])
    pair = [read_result(tmp_path / name, Task(name="a")) for name in ("base", "edited")]
    found = compare(*pair, suite="s", trial=3)
    assert found.difference == pytest.approx(-0.2) and found.loss == pytest.approx(0.2)
    assert (found.only_base, found.only_edited, found.questions) == (3, 1, 10)
    assert found.p == pytest.approx(2 * (1 + 4) / 16)
    assert found.interval is not None and found.interval[0] < -0.2 < found.interval[1]
    row = task_table.task_rows([found])[0]
    assert (
        row[3:5] == ("50.0% \u00b1 1.0", "30.0% \u00b1 1.0") and row[5].startswith("-20.0 pp (") and "3 / 1" in row[6]
    )


def test_a_group_is_paired_over_all_its_tasks(tmp_path: Path) -> None:
    """Documents of its tasks have the same numbers."""
    write_result(tmp_path / "base", "g", [1, 0, 1, 1], groups=["g_one", "g_two"])
    write_result(tmp_path / "edited", "g", [1, 0, 1, 0], groups=["g_one", "g_two"])
    found = compare(*(read_result(tmp_path / n, Task(name="g")) for n in ("base", "edited")), suite="s", trial=None)
    assert found.questions == 4 and (found.only_base, found.only_edited) == (1, 0)


def test_a_figure_that_is_no_mean_of_its_questions_is_not_paired(tmp_path: Path) -> None:
    """Such as a perplexity of words."""
    for name, value in (("base", 12.5), ("edited", 13.0)):
        write_result(tmp_path / name, "p", [1.0, 2.0], metric="ppl", **{"ppl,none": value, "ppl_stderr,none": "N/A"})
    found = compare(*(read_result(tmp_path / n, Task(name="p")) for n in ("base", "edited")), suite="s", trial=None)
    assert found.difference == pytest.approx(0.5) and found.interval is None and found.base.stderr is None
    assert not task_table.is_share(found) and task_table.task_rows([found])[0][5] == "+0.5"


# ----- the command -----


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    finished = finished_run.make(tmp_path / "runs" / "mine", n_trials=6)
    run, record = finished.run, finished.record
    run.save_directions({name: torch.randn(finished_run.N_LAYERS + 1, 1, 4) for name in finished_run.SETS})
    storage = open_storage(None, run.path)
    study = optuna.create_study(study_name=record.settings.study.name, storage=storage, directions=["minimize"] * 2)
    study.add_trials(finished.study.trials)
    return run


def selected_of(run: RunDirectory) -> SelectedRecord:
    selected = run.read().selected
    assert selected is not None
    return selected


def with_results(run: RunDirectory, trial: int | None, **values: tuple[Sequence[float], Sequence[float]]) -> Path:
    """A suite whose tasks have all been done; returns its file."""
    file = run.path.parent / "suite.toml"
    file.write_text("".join(f"[[task]]\nname = '{name}'\n" for name in values))
    suite, plan = load_suite(str(file)), suites._plan_of_run(run, trial)
    for task in suite.task:
        for asked, own in zip(plan.asked, values[task.name]):
            place = suites._place(plan, asked, suite, task)
            if not place.exists():
                write_result(place, task.name, own)
    return file


HALF, LESS = [1, 0] * 20, [1, 0, 0, 0] * 10


def test_what_was_done_is_not_done_again_and_is_noted(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """No lm-eval is looked for, no server started. The gate decides the exit code, the report shows the table."""
    suite = with_results(run, None, good=(HALF, HALF), bad=(HALF, LESS))
    command = ["evaluate", str(run.path), "--suite", str(suite), "--lm-eval", "/nowhere"]
    assert main(command) == 0
    assert "-25.0 pp" in capsys.readouterr().out
    assert main([*command, "--gate", "2pp"]) == 1
    assert main([*command, "--gate", "25pp"]) == 0
    noted, number = run.read().evaluations, selected_of(run).number
    assert [(each.task, each.trial, each.difference) for each in noted] == [
        ("good", number, 0.0),
        ("bad", number, -0.25),
    ]
    assert "-25.0 pp" in run.report_file.read_text()
    another = next(n for n in range(6) if n != number)
    suite = with_results(run, another, bad=(HALF, HALF))
    assert main(["evaluate", f"{run.path}:{another}", "--suite", str(suite)]) == 0
    assert len(run.read().evaluations) == 3
    assert [found.trial for found in task_table.of_selected(run.read())] == [number, number]


def test_the_card_of_the_saved_model_has_the_table(run: RunDirectory) -> None:
    suite = with_results(run, None, bad=(HALF, LESS))
    model = run.model_folder
    model.mkdir()
    (model / "bruno.json").write_text("{}")
    (model / "README.md").write_text("---\nlicense: mit\n---\nold")
    run.update(selected=selected_of(run).model_copy(update={"saved_path": str(model)}))
    assert main(["evaluate", str(run.path), "--suite", str(suite)]) == 0
    card = (model / "README.md").read_text()
    assert "| bad | acc | 40 | 50.0% \u00b1 1.0 | 25.0% \u00b1 1.0 | -25.0 pp" in card and "license: mit" in card


def test_another_edit_or_model_is_asked_anew(run: RunDirectory) -> None:
    task = Task(name="a")
    suite = Suite(name="s", task=(task,))
    one, other = suites._plan_of_run(run, 0), suites._plan_of_run(run, 2)
    places = [suites._place(plan, asked, suite, task) for plan in (one, other) for asked in plan.asked]
    assert places[0] == places[2] and len(set(places)) == 3, "the base is asked once"
    longer = suites._place(one, one.asked[0], suite, task.model_copy(update={"fewshot": 5}))
    assert longer not in places
    assert suites._place(one, one.asked[0], suite, task.model_copy(update={"metric": "acc"})) == places[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gate", "2pp"], "add --suite"),
        (["--suite", "quick", "--gate", "2"], "percentage points, such as 2pp"),
        (["--suite", "quickest"], "full, quick, a TOML file, or a folder"),
        (["--suite", "quick", "--base", "other"], "a run knows its base model"),
    ],
)
def test_mistakes_are_one_line(
    run: RunDirectory, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run.path), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_lm_eval_is_told_the_full_path_of_a_model_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a folder of its own."""
    tiny_models.write(tmp_path / "tiny", "llama")
    monkeypatch.chdir(tmp_path)
    assert suites._tokenizer(ModelSettings(id="tiny"))[0] == str(tmp_path / "tiny")
