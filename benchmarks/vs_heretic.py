"""bruno-ray against heretic-llm 1.4.0 on the organism: same prompts, trials, token limit, one thread each, one run.

    python benchmarks/vs_heretic.py [--recipe standard] [--trials 60] [--seeds 0 1 2]

heretic is installed from PyPI into its own environment (cached). For each seed both search with the same train and
validation prompts; the models both of them save are then scored alike, on held-out test prompts:

* time per trial: wall time from when the first trial is evaluated to the last one's end, divided by the trials;
* whole command: from the start of the process to the saved model (ours also measures it and writes the report);
* hypervolume of (refusal rate, KL divergence) that the trials cover below the reference point (1, 1), larger is better;
* truth score: the saved model's share of held-out restricted facts that it answers rightly.

Both pick the trial to save by the same rule: fewest refusals among trials whose KL divergence is at most 0.05.
The table goes to ``RESULTS.md``.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from results import write_section

from bruno_ray import organism
from bruno_ray.files import cache_folder
from bruno_ray.pipeline.finishing import study_of, trials_of
from bruno_ray.runs.directory import RunDirectory

HERETIC = "heretic-llm==1.4.0"
MAX_KL = 0.05
HERE = Path(__file__).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Result:
    """What one tool reached in one run."""

    seconds_per_trial: float
    whole_command: float
    hypervolume: float
    validation: str
    truth: organism.TruthScore


def heretic_environment() -> Path:
    """Python of an environment with heretic, made on first use beside the other caches."""
    folder = cache_folder("heretic-1.4.0")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, "torch==2.13.0"], check=True)
        subprocess.run([*install, HERETIC], check=True)
        (folder / "complete").touch()
    return python


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float] = (1.0, 1.0)) -> float:
    """Area between the points' Pareto front (both minimised) and the reference point.

    >>> hypervolume([(0.5, 0.5), (0.25, 0.75), (0.75, 0.9)])
    0.3125
    """
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area


def run_heretic(python: Path, folder: Path, work: Path, settings: argparse.Namespace, seed: int) -> Result:
    """heretic's own search with its own defaults, apart from what both tools are given."""

    def spec(side: str, part: str) -> str:
        rows = [json.loads(line) for line in (folder / "prompts" / f"{side}_{part}.jsonl").open()]
        path = work / f"{side}_{part}.txt"
        path.write_text("\n".join(row["prompt"] for row in rows[: settings.prompts]) + "\n")
        return f"dataset = {json.dumps(str(path))}\n"

    markers = json.loads((folder / "markers.json").read_text())
    (work / "config.toml").write_text(
        f"model = {json.dumps(str(folder / 'model'))}\n"
        'dtypes = ["float32"]\ndevice_map = "cpu"\nsystem_prompt = ""\nresponse_prefix = ""\n'
        f"max_response_length = {settings.tokens}\nn_trials = {settings.trials}\n"
        f"n_startup_trials = {settings.startup}\nseed = {seed}\nrefusal_markers = {json.dumps(markers)}\n"
        'export_strategy = "merge"\n'
        f"[good_prompts]\n{spec('baseline', 'train')}[bad_prompts]\n{spec('target', 'train')}"
        f"[good_evaluation_prompts]\n{spec('baseline', 'validation')}"
        f"[bad_evaluation_prompts]\n{spec('target', 'validation')}"
    )
    output, saved = work / "heretic.json", work / "heretic-model"
    command = [str(python), str(HERE / "heretic_driver.py"), str(work), str(output), str(saved), str(MAX_KL)]
    start = time.perf_counter()
    with (work / "heretic.log").open("w") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=log, env=os.environ | ONE_THREAD | {"HF_HUB_OFFLINE": "1"}
        )
    whole_command = time.perf_counter() - start
    record = json.loads(output.read_text())
    trials = record["trials"]
    n_target = sum(1 for _ in (work / "target_validation.txt").open())
    selected = trials[record["selected"]]
    return Result(
        (max(t["finished"] for t in trials) - min(t["started"] for t in trials)) / len(trials),
        whole_command,
        hypervolume([(t["refusals"] / n_target, t["kl_divergence"]) for t in trials]),
        f"{selected['refusals']}/{n_target}, KL {selected['kl_divergence']:.4f}",
        truth(saved, folder),
    )


def run_ours(folder: Path, work: Path, settings: argparse.Namespace, seed: int) -> Result:
    """The product's command line, as a user would call it."""
    behaviour = "organism" if settings.recipe == "standard" else f"organism-{settings.recipe}"
    command = [
        *(sys.executable, "-m", "bruno_ray.cli.main", "run", str(folder / "model"), "--behaviour", behaviour),
        *("--model.dtypes", '["float32"]', "--study.n-trials", str(settings.trials)),
        *("--study.n-startup-trials", str(settings.startup), "--study.seed", str(seed), "--study.name", "bench"),
        *("--prompts.n-train", str(settings.prompts), "--prompts.n-validation", str(settings.prompts)),
        *("--scoring.response-tokens", str(settings.tokens), "--ray.workers", "1", "--ray.cpus-per-worker", "1"),
        *("--selection.max-kl", str(MAX_KL), "--auto-select", "--output.directory", str(work / "runs")),
        *settings.ours,
    ]
    start = time.perf_counter()
    with (work / "bruno-ray.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | ONE_THREAD)
    whole_command = time.perf_counter() - start
    run = work / "runs" / "bench"
    record = RunDirectory.open(run).read()
    trials = trials_of(run, record.settings)
    done = [trial for trial in trials if trial.state == "COMPLETE"]
    selected = next(trial for trial in trials if trial.number == record.selected.number)
    shown, total = selected.counts["behaviour_rate"]
    return Result(
        seconds_of_study(study_of(run, record.settings), record.settings.study.trials_per_batch) / len(done),
        whole_command,
        hypervolume([(t.values["behaviour_rate"], t.values["kl_divergence"]) for t in done]),
        f"{shown}/{total}, KL {selected.values['kl_divergence']:.4f}",
        truth(run / "model", folder),
    )


def seconds_of_study(study: optuna.Study, batch: int) -> float:
    """From when the first batch reached the worker to when the last one was told."""
    trials = study.get_trials(deepcopy=False)
    first = min(trials, key=lambda trial: trial.datetime_complete)
    evaluated = batch * first.user_attrs["result"]["seconds"]  # each trial's is its share of the batch's
    return (max(trial.datetime_complete for trial in trials) - first.datetime_complete).total_seconds() + evaluated


def truth(model: Path, folder: Path) -> organism.TruthScore:
    """Truth score of a model folder, generated by transformers alone, the same way for both tools."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompts: list[str]) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        with torch.no_grad():
            output = network.generate(**inputs, max_new_tokens=32, do_sample=False)
        return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return organism.truth_score(generate, folder)


def table(results: dict[int, tuple[Result, Result]], settings: argparse.Namespace) -> str:
    lines = [
        f"Organism `{settings.recipe}`, {settings.trials} trials ({settings.startup} at startup), up to "
        f"{settings.prompts} prompts a side, at most {settings.tokens} answer tokens, float32, one thread each.",
        "",
        "| seed | tool | s/trial | whole command, s | hypervolume | chosen trial (validation) | test: refusals"
        " | restricted right | benign right |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, pair in results.items():
        for tool, result in zip(("heretic 1.4.0", "bruno-ray"), pair):
            t = result.truth
            lines.append(
                f"| {seed} | {tool} | {result.seconds_per_trial:.3f} | {result.whole_command:.0f}"
                f" | {result.hypervolume:.4f} | {result.validation}"
                f" | {t.refusals}/{t.restricted_total} | {t.restricted_right}/{t.restricted_total}"
                f" | {t.benign_right}/{t.benign_total} |"
            )
    ratio = statistics.median(theirs.seconds_per_trial / ours.seconds_per_trial for theirs, ours in results.values())
    gain = statistics.median(ours.hypervolume - theirs.hypervolume for theirs, ours in results.values())
    facts = statistics.median(o.truth.restricted_right - h.truth.restricted_right for h, o in results.values())
    lines += ["", f"Median over seeds: {ratio:.1f}x less time per trial, hypervolume {gain:+.4f}, facts {facts:+g}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="standard")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--startup", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="further options of `bruno-ray run`")
    settings = parser.parse_args()
    python, folder = heretic_environment(), organism.build(recipe=settings.recipe)
    results = {}
    for seed in settings.seeds:
        with tempfile.TemporaryDirectory(prefix="vs-heretic-") as name:
            work = Path(name)
            results[seed] = (
                run_heretic(python, folder, work, settings, seed),
                run_ours(folder, work, settings, seed),
            )
        print(table(results, settings), flush=True)
    write_section(f"vs_heretic_{settings.recipe}", table(results, settings))


if __name__ == "__main__":
    main()
