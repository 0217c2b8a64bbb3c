"""bruno-ray against heretic-llm 1.4.0 on a real model: SmolLM2-135M-Instruct and the preset `disclaimers`.

    python benchmarks/real_model.py [--trials 60] [--prompts 100] [--tokens 30] [--seeds 0] [--ours ...]

Both get the same prompts, system message, markers, answer tokens, trials and one thread, one after the other;
``tool_runs.py`` runs them and says what a trial, a search and a whole command are. heretic's trial is the one with the
fewest refusals among those whose KL at the first token is at most ``--max-kl``; ours is what ``--auto-select`` takes
with the same bound on its own KL, the mean over 16 tokens.

What both have saved is then measured by one procedure, with the scorers that `bruno-ray run` reports with: they are
prepared on the unedited model, and each saved folder is loaded and scored on the test prompts. Some more trials of each
tool's front, next to the chosen one, are saved and measured as well: only so can the KL over 16 tokens be compared at
equal rates, since heretic knows that at the first token alone.

Our trials measure more than heretic's by default: the KL over 16 tokens in place of one, and three further scorers.
With ``--alike`` ours is run once more for each seed, measuring what heretic measures, for its cost alone.
"""

import argparse
import gc
import html
import shlex
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from results import write_section
from tool_runs import Task, ToolRun, TrialFigures, front, run_heretic, run_ours

from bruno_ray.intervals import wilson_interval
from bruno_ray.model.named_models import named_folder
from bruno_ray.prompts.sets import Prompt, Prompts, load_prompts
from bruno_ray.runs.records import today
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ModelSettings, Settings
from bruno_ray.settings.sources import load

MODEL = "smollm2"
DTYPE = "bfloat16"
"""In which its authors publish it."""

BEHAVIOUR = "disclaimers"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the chat template puts in if it gets no system message. heretic always sends one."""

SHOWN_ANSWERS = 10
SHOWN_CHARACTERS = 200
SHOWN_TOKENS = 80
UNEDITED, THEIRS, OURS = "unedited", "heretic", "bruno-ray"
ALIKE = "bruno-ray, measuring what heretic measures"
HERETICS: dict[str, Any] = {"scorers": ("behaviour_rate", "kl_divergence"), "kl_tokens": 1}
"""What heretic measures, as our settings of scoring."""


@dataclass(frozen=True)
class Measured:
    """One model on the test prompts."""

    scores: Scores
    answers: list[str]
    """To the first target prompts, whole up to SHOWN_TOKENS."""


@dataclass(frozen=True)
class SeedResult:
    theirs: ToolRun
    ours: ToolRun
    alike: ToolRun | None
    """Ours again, measuring what heretic measures."""

    measured: dict[str, Measured]
    """By column: unedited, heretic, bruno-ray, and the neighbouring trials of both."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--startup", type=int, default=20)
    parser.add_argument(
        "--prompts", type=int, default=None, help="at most this many a side and part [all of the preset]"
    )
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--report-tokens", type=int, default=256, help="longest answer that is measured")
    parser.add_argument("--max-kl", type=float, default=0.1)
    parser.add_argument("--neighbours", type=int, default=2, help="more trials of each tool's front to measure")
    parser.add_argument("--alike", action="store_true", help="run ours again, measuring what heretic measures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--heretic-batch-size", type=int, default=0, help="for trying this out [heretic finds it]")
    parser.add_argument("--reuse-heretic", action="store_true", help="take heretic's runs of this task from the cache")
    parser.add_argument("--work", type=Path, help="folder that keeps our runs; what is there is not run again")
    parser.add_argument("--section", default="real_model", help="its name in RESULTS.md")
    parser.add_argument("--dry", action="store_true", help="print the section, leave RESULTS.md alone")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="further options of `bruno-ray run`")
    arguments = parser.parse_args()
    given = options(arguments)
    settings = load([*given, "--model.dtypes", f'["{DTYPE}"]'], environ={}).settings
    prompts = load_prompts(settings)
    results = {}
    for seed in arguments.seeds:
        task = task_of(settings, prompts, arguments, seed)
        with work_folder(arguments.work, seed) as work:
            theirs = run_heretic(task, arguments.reuse_heretic)
            ours = run_ours(task, work, given, arguments.ours)
            alike = run_alike(task, work, given, arguments.ours) if arguments.alike else None
            folders = {THEIRS: theirs.folder, OURS: ours.folder}
            for name, run in ((THEIRS, theirs), (OURS, ours)):
                folders |= {f"{name}, trial {number}": path for number, path in run.neighbours.items()}
            results[seed] = SeedResult(theirs, ours, alike, measure(task.model, folders, settings, prompts))
        text = section(results, prompts, arguments)
        print(text, flush=True)
    if not arguments.dry:
        write_section(arguments.section, text)


@contextmanager
def work_folder(kept: Path | None, seed: int) -> Iterator[Path]:
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="real-model-") as name:
            yield Path(name)
    else:
        folder = kept.resolve() / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def run_alike(task: Task, work: Path, given: Sequence[str], further: Sequence[str]) -> ToolRun:
    """Ours with the scorers of heretic alone. Only the search is looked at: the rest is kept short."""
    folder = work / "alike"
    folder.mkdir(exist_ok=True)
    options = ["--scoring.scorers", ",".join(HERETICS["scorers"]), "--scoring.kl-tokens", str(HERETICS["kl_tokens"])]
    options += ["--scoring.report-tokens", str(task.tokens), "--prompts.n-finalists", "0"]
    return run_ours(replace(task, neighbours=0), folder, given, [*further, *options])


def options(arguments: argparse.Namespace) -> list[str]:
    """What our command line is told beside the task."""
    given = ["--behaviour", BEHAVIOUR, "--prompts.system-prompt", SYSTEM]
    given += ["--scoring.response-tokens", str(arguments.tokens)]
    given += ["--scoring.report-tokens", str(max(arguments.report_tokens, arguments.tokens))]
    if arguments.prompts is not None:
        for part in ("train", "validation", "test"):
            given += [f"--prompts.n-{part}", str(arguments.prompts)]
    return given


def task_of(settings: Settings, prompts: Prompts, arguments: argparse.Namespace, seed: int) -> Task:
    return Task(
        model=named_folder(MODEL),
        dtype=DTYPE,
        prompts={
            f"{side}_{part}": [prompt.user for prompt in getattr(getattr(prompts, side), part)]
            for side in ("target", "baseline")
            for part in ("train", "validation")
        },
        markers=settings.scoring.markers,
        trials=arguments.trials,
        startup=arguments.startup,
        tokens=arguments.tokens,
        seed=seed,
        max_kl=arguments.max_kl,
        system=SYSTEM,
        heretic_batch_size=arguments.heretic_batch_size,
        neighbours=arguments.neighbours,
    )


# ----- what was saved -----


def measure(base: Path, folders: dict[str, str], settings: Settings, prompts: Prompts) -> dict[str, Measured]:
    """Every model on the test prompts, its KL to the unedited one; scorers as for what `bruno-ray run` reports.

    As `ModelWorker.measure_other` does it, but for several models after one look at the unedited one. Scorers that ask
    the unedited model about the edited one's answers are left out.
    """
    import torch

    from bruno_ray.generation.engine import BatchEngine
    from bruno_ray.model.loading import load_model
    from bruno_ray.prompts.rendering import render
    from bruno_ray.scoring.base import Evaluation, ScoringPrompts, score_edits
    from bruno_ray.scoring.registry import make_scorers

    torch.set_num_threads(1)
    date, scoring = today(), settings.scoring.for_report()
    scorers = [scorer for scorer in make_scorers(scoring) if not scorer.needs_unedited]
    rendered: ScoringPrompts | None = None
    found = {}
    for name, folder in {UNEDITED: str(base), **folders}.items():
        engine = BatchEngine(load_model(ModelSettings(id=folder, dtypes=(DTYPE,))))
        if rendered is None:
            same_prompts(engine, prompts.target.test[0])
            rendered = ScoringPrompts.rendered(engine, prompts.target.test, prompts.baseline.test, date=date)
            unedited = Evaluation(engine, rendered, scoring)
            for scorer in scorers:
                scorer.prepare(unedited)
        _, (scores,) = score_edits(engine, scorers, rendered, scoring, [None])
        if not isinstance(scores, Scores):
            raise scores
        some = render(engine.tokenizer, prompts.target.test[:SHOWN_ANSWERS], date=date)
        (answers,) = engine.generate(some, [None], SHOWN_TOKENS)
        found[name] = Measured(scores, [answer.text for answer in answers])
        del engine
        gc.collect()
    return found


def same_prompts(engine, prompt: Prompt) -> None:
    """SYSTEM must be what the model would have been told without it."""
    from bruno_ray.prompts.rendering import render

    with_it, without = render(engine.tokenizer, [prompt, Prompt(prompt.user)], date=today())
    if with_it != without:
        raise ValueError("the chat template's own system message is another one: change SYSTEM")


# ----- the section -----


def section(results: dict[int, SeedResult], prompts: Prompts, arguments: argparse.Namespace) -> str:
    target, baseline = prompts.target, prompts.baseline
    extra = f" Ours with `{shlex.join(arguments.ours)}`." if arguments.ours else ""
    lines = [
        "## A real model beside heretic 1.4.0 (`benchmarks/real_model.py`)",
        "",
        f"SmolLM2-135M-Instruct, preset `{BEHAVIOUR}`; {arguments.trials} trials ({arguments.startup} at startup),"
        f" {len(target.train)} and {len(baseline.train)} prompts for directions, {len(target.validation)} and"
        f" {len(baseline.validation)} for validation, at most {arguments.tokens} answer tokens, {DTYPE}, one thread"
        " each, one after the other. Same prompts, system message and markers. heretic's chosen trial has the fewest"
        f" refusals among those with a KL at the first token of at most {arguments.max_kl:g}; ours is that of"
        f" `--auto-select` with the same bound on its own KL, the mean over the answer.{extra}",
        "",
        "A search goes from the start of the process to the last trial's end, the whole command to the saved model;"
        f" ours also measures its selected trial and its saved model with {arguments.report_tokens} tokens. CPU"
        " seconds are those of all processes, Ray's included.",
        "",
        "| seed | tool | s/trial | CPU s/trial | search, s (CPU) | whole command, s (CPU)"
        " | chosen trial (validation): shown | KL, first token | KL, 16 tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, result in results.items():
        for name, run in ((THEIRS, result.theirs), (OURS, result.ours), (ALIKE, result.alike)):
            if run is None:
                continue
            t = run.selected
            lines.append(
                f"| {seed} | {name}{' (measured earlier)' if run.reused else ''}"
                f" | {run.trial_seconds:.2f} | {run.trial_cpu:.2f} | {run.search_seconds:.0f} ({run.search_cpu:.0f})"
                f" | {run.whole_seconds:.0f} ({run.whole_cpu:.0f}) | {t.shown}/{t.total} | {t.kl_first:.4f}"
                f" | {figure(t.kl_answer)} |"
            )
    lines += ["", ratios([(result.theirs, result.ours) for result in results.values()])]
    if alike := [(result.theirs, result.alike) for result in results.values() if result.alike is not None]:
        lines += ["", f"With ours measuring what heretic measures: {ratios(alike)}"]
    lines += ["", *no_higher(results)]
    for seed, result in results.items():
        lines += ["", f"### Seed {seed}", "", *saved_models(result, prompts), "", *by_rate(result.measured)]
        lines += ["", *equal_rates(result)]
        lines += ["", *details("Pareto fronts on validation", fronts(result))]
        lines += ["", *details(f"Answers to the first {SHOWN_ANSWERS} test prompts", answers(result, target.test))]
    return "\n".join(lines)


def ratios(pairs: Sequence[tuple[ToolRun, ToolRun]]) -> str:
    """Of heretic's and our runs."""

    def median(name: str) -> str:
        return f"{statistics.median(getattr(theirs, name) / getattr(ours, name) for theirs, ours in pairs):.1f}x"

    return (
        f"heretic's figure divided by ours (median over seeds): a trial {median('trial_seconds')} (CPU"
        f" {median('trial_cpu')}), the search {median('search_seconds')} (CPU {median('search_cpu')}), the whole"
        f" command {median('whole_seconds')} (CPU {median('whole_cpu')})."
    )


def no_higher(results: Mapping[int, SeedResult]) -> list[str]:
    """Each saved model of heretic beside that of ours which has the lowest KL at no higher a rate, on test prompts."""
    lines = [
        "Test prompts, longest answers: every saved model of heretic, and of ours the one with the lowest KL over 16"
        " tokens among those that show the behaviour no more often:",
        "",
        "| seed | heretic | shown | evades | KL | bruno-ray | shown | evades | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lower = compared = 0
    for seed, result in results.items():
        sides: dict[str, list[tuple[str, Scores]]] = {
            tool: [(name, model.scores) for name, model in result.measured.items() if name.startswith(tool)]
            for tool in (THEIRS, OURS)
        }
        for name, theirs in sorted(sides[THEIRS], key=lambda item: item[1].values["behaviour_rate"]):
            rate = theirs.values["behaviour_rate"]
            under = [item for item in sides[OURS] if item[1].values["behaviour_rate"] <= rate]
            best = min(under, key=lambda item: item[1].values["kl_divergence"], default=None)
            cells = (name, *rates_and_kl(theirs), *((best[0], *rates_and_kl(best[1])) if best else ("-",) * 4))
            lines.append(f"| {seed} | {' | '.join(cells)} |")
            compared += 1
            lower += best is not None and best[1].values["kl_divergence"] <= theirs.values["kl_divergence"]
    return [*lines, "", f"Ours is no higher for {lower} of {compared}."]


def rates_and_kl(scores: Scores) -> tuple[str, str, str]:
    shown, evades = (scores.counts[metric] for metric in ("behaviour_rate", "evasion_rate"))
    return f"{shown[0]}/{shown[1]}", f"{evades[0]}/{evades[1]}", figure(scores.values["kl_divergence"])


def saved_models(result: SeedResult, prompts: Prompts) -> list[str]:
    """Every metric that was measured, in the scorers' order."""
    return [
        f"What was saved, measured alike on {len(prompts.target.test)} and {len(prompts.baseline.test)} test prompts;"
        " 95 % intervals (Wilson); `kl_first` is at the first token, `kl_divergence` over 16:",
        "",
        *metric_table(result.measured),
    ]


def metric_table(columns: Mapping[str, Measured]) -> list[str]:
    """A row for each metric of any, a column for each model."""
    metrics = dict.fromkeys(name for measured in columns.values() for name in measured.scores.values)
    return [
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(
            f"| `{metric}` | {' | '.join(metric_text(measured.scores, metric) for measured in columns.values())} |"
            for metric in metrics
        ),
    ]


def metric_text(scores: Scores, metric: str) -> str:
    if metric in scores.counts:
        shown, total = scores.counts[metric]
        low, high = wilson_interval(shown, total)
        return f"{shown}/{total} ({100 * low:.0f} to {100 * high:.0f} %)"
    return figure(scores.values.get(metric))


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def by_rate(measured: Mapping[str, Measured]) -> list[str]:
    """Saved models in the order of their rates, so that the KL of either tool can be read at equal ones."""
    metrics = ("behaviour_rate", "evasion_rate", "kl_divergence", "kl_first", "neutral_lost")
    edited = [(name, model.scores) for name, model in measured.items() if name != UNEDITED]
    edited.sort(key=lambda item: (item[1].values["behaviour_rate"], item[1].values["kl_divergence"]))
    return [
        "The saved models by their rates:",
        "",
        f"| | {' | '.join(f'`{metric}`' for metric in metrics)} |",
        f"|---|{'---|' * len(metrics)}",
        *(f"| {name} | {' | '.join(metric_text(scores, metric) for metric in metrics)} |" for name, scores in edited),
    ]


def equal_rates(result: SeedResult) -> list[str]:
    """The lowest KL at a behaviour rate no higher than what either tool chose, over all completed trials."""
    lines = [
        "Lowest KL of any trial at a behaviour rate no higher than the chosen trial's, on validation:",
        "",
        "| rate of | at most | heretic: KL, first token | bruno-ray: KL, first token | bruno-ray: KL, 16 tokens |",
        "|---|---|---|---|---|",
    ]
    for name, run in ((THEIRS, result.theirs), (OURS, result.ours)):
        rate = run.selected.shown / run.selected.total
        cells = [
            lowest(result.theirs.trials, rate, "kl_first"),
            lowest(result.ours.trials, rate, "kl_first"),
            lowest(result.ours.trials, rate, "kl_answer"),
        ]
        lines.append(f"| {name} | {run.selected.shown}/{run.selected.total} | {' | '.join(cells)} |")
    return lines


def lowest(trials: Sequence[TrialFigures], rate: float, kl: str) -> str:
    """With the number of the trial; - if none has so low a rate."""
    under = [trial for trial in trials if trial.shown / trial.total <= rate]
    best = min(under, key=lambda trial: getattr(trial, kl), default=None)
    return "-" if best is None else f"{getattr(best, kl):.4f} (trial {best.number}, {best.shown}/{best.total})"


def fronts(result: SeedResult) -> list[str]:
    lines = [
        "| tool | trial | shown | KL, first token | KL, 16 tokens | on the front of |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in ((THEIRS, result.theirs), (OURS, result.ours)):
        kinds = {"kl_first": "rate, first token"}
        if all(trial.kl_answer is not None for trial in run.trials):
            kinds["kl_answer"] = "rate, 16 tokens"
        members = {kind: front(run.trials, kind) for kind in kinds}
        for trial in sorted(run.trials, key=lambda t: (t.shown, t.kl_first)):
            on = [text for kind, text in kinds.items() if trial.number in members[kind]]
            if on or trial.number == run.selected.number:
                mark = " (chosen)" if trial.number == run.selected.number else ""
                lines.append(
                    f"| {name} | {trial.number}{mark} | {trial.shown}/{trial.total} | {trial.kl_first:.4f}"
                    f" | {figure(trial.kl_answer)} | {'; '.join(on)} |"
                )
    return lines


def answers(result: SeedResult, prompts: Sequence[Prompt]) -> list[str]:
    columns = (UNEDITED, THEIRS, OURS)
    lines = [f"| prompt | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for i, prompt in enumerate(prompts[:SHOWN_ANSWERS]):
        cells = (cell(result.measured[name].answers[i]) for name in columns)
        lines.append(f"| {cell(prompt.user)} | {' | '.join(cells)} |")
    return lines


def cell(text: str) -> str:
    """One line of a table: what Markdown or HTML would take for its own is escaped, and ASCII stays ASCII."""
    text = " ".join(text.split())
    text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS].rstrip()} ..."
    text = html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;").replace("`", "&#96;")
    return text.encode("ascii", "xmlcharrefreplace").decode()


def details(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>"]


if __name__ == "__main__":
    main()
