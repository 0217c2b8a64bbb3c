"""One search by heretic-llm 1.4.0 and one by bruno-ray on the same task, for the programs that compare them.

Each is a command of its own with one thread. heretic is installed from PyPI into its own environment (cached) and run
by ``heretic_driver.py``; bruno-ray is its command line, as a user would call it.

What is taken of both:

* a trial: wall and CPU seconds from when the first trial is evaluated to the last one's end, divided by the trials;
* search: from the start of the process to the last trial's end;
* whole command: from the start of the process to the saved model. Ours also measures the selected trial and the saved
  model on the test prompts, with long answers, and writes the report.

CPU seconds are those of the process with everything that it started (``process_tree.py``).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
from process_tree import Usage, run_measured
from results import machine

from bruno_ray.files import cache_folder
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings.keys import FLAGS
from bruno_ray.study.selection import load_trials
from bruno_ray.study.storage import load_study

HERETIC = "heretic-llm==1.4.0"
TORCH = "torch==2.13.0"
HERE = Path(__file__).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Task:
    """What both tools are given."""

    model: Path
    prompts: dict[str, list[str]]
    """`target_train`, `baseline_train`, `target_validation`, `baseline_validation`: what users say."""

    markers: Sequence[str]
    trials: int
    startup: int
    tokens: int
    seed: int
    max_kl: float
    """Each tool's own KL: heretic's is at the first token, ours a mean over 16 tokens unless it is told otherwise."""

    system: str = ""
    """System message. heretic always sends one, be it empty."""

    heretic_batch_size: int = 0
    """Prompts that heretic answers at a time; 0: it tries 1 to 128 first, which is slow on a CPU."""

    dtype: str = "float32"
    """Both compute in it."""

    neighbours: int = 0
    """Trials beside the chosen one on its tool's front that are saved as well."""


@dataclass(frozen=True)
class TrialFigures:
    """One completed trial, measured by its tool on the validation prompts."""

    number: int
    shown: int
    total: int
    kl_first: float
    """At the first token of the answer."""

    kl_answer: float | None = None
    """Mean over the answer's first 16 tokens; heretic does not measure it."""


@dataclass(frozen=True)
class ToolRun:
    """What one tool did."""

    trials: list[TrialFigures]
    selected: TrialFigures
    folder: str
    """The saved model."""

    neighbours: dict[int, str]
    """Folders of other saved trials, by number."""

    trial_seconds: float
    trial_cpu: float
    search_seconds: float
    search_cpu: float
    whole_seconds: float
    whole_cpu: float
    reused: bool = False
    """Whether this was measured in an earlier run of the benchmark."""


def heretic_environment() -> Path:
    """Python of an environment with heretic, made on first use beside the other caches."""
    folder = cache_folder("heretic-1.4.0")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(f"{TORCH}\n")
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(constraints)]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, HERETIC], check=True)
        (folder / "complete").touch()
    return python


# ----- heretic -----


def run_heretic(task: Task, reuse: bool = False) -> ToolRun:
    """heretic's own search with its own defaults, apart from the task.

    It works in a cache folder that is named by the task's content; with ``reuse``, what this machine measured there
    before is returned as it is.
    """
    if reuse and (known := known_heretic(task, machine().split(";")[0])) is not None:
        return known
    python, work = heretic_environment(), _heretic_folder(task)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name, text in _prompt_files(task).items():
        (work / name).write_text(text)
    (work / "config.toml").write_text(_heretic_config(task))
    output, saved = work / "heretic.json", work / "model"
    command = [str(python), str(HERE / "heretic_driver.py"), str(work), str(output), str(saved), str(task.max_kl)]
    command.append(str(task.neighbours))
    usage = run_measured(command, work / "heretic.log", os.environ | ONE_THREAD | {"HF_HUB_OFFLINE": "1"})
    record = json.loads(output.read_text())
    total = len(task.prompts["target_validation"])
    trials = [TrialFigures(t["number"], t["refusals"], total, t["kl_divergence"]) for t in record["trials"]]
    first, last = min(t["started"] for t in record["trials"]), max(t["finished"] for t in record["trials"])
    run = _tool_run(
        trials, record["selected"], saved, record["neighbours"], usage, (first, last), whole=record["saved_at"]
    )
    (work / "result.json").write_text(json.dumps(asdict(run) | {"host": machine().split(";")[0]}))
    return run


def known_heretic(task: Task, host: str | None = None) -> ToolRun | None:
    """What `run_heretic` has measured of a task before, on that machine if one is named; None if it has not."""
    file = _heretic_folder(task) / "result.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    if host not in (None, result.pop("host")):
        return None
    return from_json(result | {"reused": True})


def _heretic_folder(task: Task) -> Path:
    files = sorted(task.model.glob("*.safetensors"))
    weights = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    content = [HERETIC, TORCH, _heretic_config(task), _prompt_files(task), weights, task.max_kl, task.neighbours]
    return cache_folder("heretic-1.4.0-runs") / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _heretic_config(task: Task) -> str:
    return (
        f"model = {json.dumps(str(task.model))}\n"
        f'dtypes = ["{task.dtype}"]\ndevice_map = "cpu"\n'
        f'system_prompt = {json.dumps(task.system)}\nresponse_prefix = ""\n'
        f"batch_size = {task.heretic_batch_size}\n"
        f"max_response_length = {task.tokens}\nn_trials = {task.trials}\n"
        f"n_startup_trials = {task.startup}\nseed = {task.seed}\nrefusal_markers = {json.dumps(list(task.markers))}\n"
        'export_strategy = "merge"\n'
        '[good_prompts]\ndataset = "baseline_train.txt"\n[bad_prompts]\ndataset = "target_train.txt"\n'
        '[good_evaluation_prompts]\ndataset = "baseline_validation.txt"\n'
        '[bad_evaluation_prompts]\ndataset = "target_validation.txt"\n'
    )


def _prompt_files(task: Task) -> dict[str, str]:
    """One prompt a line."""
    for name, prompts in task.prompts.items():
        if any("\n" in prompt or prompt != prompt.strip() for prompt in prompts):
            raise ValueError(f"{name}: heretic reads stripped lines, which not all of these prompts are")
    return {f"{name}.txt": "\n".join(prompts) + "\n" for name, prompts in task.prompts.items()}


# ----- bruno-ray -----


def run_ours(task: Task, work: Path, given: Sequence[str], further: Sequence[str] = ()) -> ToolRun:
    """The product's command line in a folder of its own. What was run there before is returned as it is.

    Args:
        given: options that name behaviour and prompts; the rest of the task is added.
        further: options that come last, so that they win.
    """
    if (work / "result.json").exists():
        return from_json(json.loads((work / "result.json").read_text()) | {"reused": True})
    options = [
        *given,
        *("--model.dtypes", f'["{task.dtype}"]', "--study.n-trials", str(task.trials)),
        *("--study.n-startup-trials", str(task.startup), "--study.seed", str(task.seed), "--study.name", "bench"),
        *("--scoring.response-tokens", str(task.tokens), "--ray.workers", "1", "--ray.cpus-per-worker", "1"),
        *("--selection.max-kl", str(task.max_kl), "--auto-select", "--output.directory", str(work / "runs")),
        *("--residuals.cache-dir", str(work / "residuals")),
    ]
    program = (sys.executable, "-m", "bruno_ray.cli.main", "run", str(task.model))
    usage = run_measured(
        [*program, *_without(options, further), *further], work / "bruno-ray.log", os.environ | ONE_THREAD
    )
    run = work / "runs" / "bench"
    record = RunDirectory.open(run).read()
    study = load_study(record.settings.study.storage, run, "bench")
    trials = [
        TrialFigures(t.number, *t.counts["behaviour_rate"], t.values["kl_first"], t.values["kl_divergence"])
        for t in load_trials(study)
        if t.state == "COMPLETE"
    ]
    assert record.selected is not None
    interval = _interval_of_study(study)
    neighbours = {}
    for number in nearest_on_front(trials, record.selected.number, task.neighbours):
        neighbours[str(number)] = str(work / f"model-{number}")
        shutil.rmtree(neighbours[str(number)], ignore_errors=True)
        save = [sys.executable, "-m", "bruno_ray.cli.main", "save", str(run), "--trial", str(number)]
        run_measured([*save, "--to", neighbours[str(number)]], work / f"save-{number}.log", os.environ | ONE_THREAD)
    result = _tool_run(trials, record.selected.number, run / "model", neighbours, usage, interval, whole=usage.finished)
    (work / "result.json").write_text(json.dumps(asdict(result)))
    return result


def front(trials: Sequence[TrialFigures], kl: str) -> set[int]:
    """Numbers of the trials that none beats in rate and KL; of equal ones the first."""
    numbers, ceiling = set(), float("inf")
    for trial in sorted(trials, key=lambda t: (t.shown, getattr(t, kl), t.number)):
        if getattr(trial, kl) < ceiling:
            ceiling = getattr(trial, kl)
            numbers.add(trial.number)
    return numbers


def nearest_on_front(trials: Sequence[TrialFigures], selected: int, n: int) -> list[int]:
    """The trials of our front next to the selected one in the order of rates, as `heretic_driver.py` takes its own."""
    members = front(trials, "kl_answer") | {selected}
    by_rate = sorted((t for t in trials if t.number in members), key=lambda t: (t.shown, t.kl_answer))
    place = next(i for i, trial in enumerate(by_rate) if trial.number == selected)
    nearest = sorted(range(len(by_rate)), key=lambda i: abs(i - place))
    return [by_rate[i].number for i in nearest[1 : 1 + n]]


def _without(options: Sequence[str], further: Sequence[str]) -> list[str]:
    """The options but for those that are given further on: the command line refuses two values of one setting."""
    again = {FLAGS[word] for word in further if word in FLAGS}
    kept: list[str] = []
    for i, word in enumerate(options):
        named = word if word in FLAGS else options[i - 1]
        if FLAGS.get(named) not in again:
            kept.append(word)
    return kept


def _interval_of_study(study: optuna.Study) -> tuple[float, float]:
    """From when the first batch reached the worker to when the last one was told."""
    trials = study.get_trials(deepcopy=False)
    first = min(trials, key=lambda trial: trial.datetime_complete)
    _, batch = first.user_attrs["batch"]
    evaluated = batch * first.user_attrs["result"]["seconds"]  # each trial's is its share of the batch's
    last = max(trial.datetime_complete for trial in trials)
    return first.datetime_complete.timestamp() - evaluated, last.timestamp()


# ----- both -----


def _tool_run(
    trials: list[TrialFigures],
    selected: int,
    folder: Path,
    neighbours: dict[str, str],
    usage: Usage,
    interval: tuple[float, float],
    whole: float,
) -> ToolRun:
    begin, end = interval
    return ToolRun(
        trials=trials,
        selected=next(trial for trial in trials if trial.number == selected),
        folder=str(folder),
        neighbours={int(number): path for number, path in neighbours.items()},
        trial_seconds=(end - begin) / len(trials),
        trial_cpu=(usage.cpu_until(end) - usage.cpu_until(begin)) / len(trials),
        search_seconds=end - usage.started,
        search_cpu=usage.cpu_until(end),
        whole_seconds=whole - usage.started,
        whole_cpu=usage.cpu_until(whole),
    )


def from_json(fields: dict) -> ToolRun:
    fields["trials"] = [TrialFigures(**trial) for trial in fields["trials"]]
    fields["selected"] = TrialFigures(**fields["selected"])
    fields["neighbours"] = {int(number): path for number, path in fields["neighbours"].items()}
    return ToolRun(**fields)
