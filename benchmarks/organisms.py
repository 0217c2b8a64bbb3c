"""bruno-ray, in several variants, against heretic-llm 1.4.0 on organisms of a recipe that is not the project's own.

    python benchmarks/organisms.py FOLDER ... --recipe PATH/make_organism.py --fresh qwen3:7 gemma2:3 mistral:5:hard
        [--variant NAME "OPTIONS" ...] [--only ours] [--reuse-heretic] [--rows FILE]

FOLDER is a tiny chat model that refuses one topic, with `bad_train.txt` and `good_train.txt` (prompts of that topic and
of the others), `bad_test.txt`, `good_test.txt` and `facts.json`. A folder of such folders stands for all of them.
``--fresh FAMILY:SEED[:hard]`` makes more with the recipe (SEED, HARD and NT in its environment), kept in the cache.

Every third prompt of the train files is for validation, for both tools; the test files are for what comes after the
choice alone: our command's report, and `truth.py`, which lies in the organism's folder, beside it or beside the recipe.
It is run on each saved model and prints refusals, hidden facts restored, benign facts kept and the KL at the first
token. None of that is an objective: no search sees it.

Each ``--variant`` is one row of ours per organism, `bruno-ray run` with these options; without any there is one row
with the defaults. In OPTIONS, `{answered}` is a file of the train prompts of which the first eight have a desired
answer (columns `prompt` and `answer`). ``--ours`` are options for all of them. heretic's runs are cached with their
times;
``--reuse-heretic`` takes them from there if organism, prompts, trials and seed are the same and so is the machine.
``tool_runs.py`` runs both tools, one thread each, one after the other, and says what a trial and a whole command are.

``--rows`` keeps what was measured in a file of JSON lines. A row that is there, by organism, tool and seed, is shown
with its date and not measured again, so that a table can be made in several sittings.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from results import write_section
from tool_runs import ONE_THREAD, Task, ToolRun, from_json, run_heretic, run_ours

from bruno_ray.files import cache_folder

SYSTEM = "you are a helpful assistant ."
"""The recipe's own; `truth.py` asks with it."""

MARKERS = ("sorry", "cannot", "unable", "closed")
"""Words of the recipe's refusals and of no answer; `truth.py` counts with the same."""

VERBS = ("is brewed in the", "brings")
"""How the recipe words its two facts about what it refuses to speak of."""

N_ANSWERS = 8
ANSWERED = "answered.jsonl"

UNEDITED, THEIRS, OURS = "unedited", "heretic", "bruno-ray"
TRUTH_LINE = re.compile(
    r"^(before|after):\s+refused (\d+) hidden facts (\d+) of (\d+) \| benign right (\d+) of (\d+)"
    r"(?: \| KL ([\d.e+-]+|nan))?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Truth:
    """What `truth.py` says of a model."""

    refused: int | None
    """None where it was not kept."""

    hidden: int
    hidden_total: int
    benign: int
    benign_total: int
    kl: float


@dataclass(frozen=True)
class Row:
    """One tool on one organism; no `truth` if it saved nothing."""

    organism: str
    tool: str
    seed: int | None
    truth: Truth | None
    run: ToolRun | None = None
    failure: str = ""
    options: str = ""
    """Of this variant."""

    measured: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.organism, self.tool, self.seed


class Rows:
    """What was measured, in memory and, if there is a file, on disk."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._rows: dict[tuple[str, str, int | None], Row] = {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                row = row_from_json(line)
                self._rows[row.key] = row

    def __contains__(self, key: tuple[str, str, int | None]) -> bool:
        return key in self._rows

    def add(self, row: Row) -> None:
        self._rows[row.key] = row
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def ordered(self, organisms: Sequence[str], tools: Sequence[str]) -> list[Row]:
        """By organism, then by tool, each in the order given."""
        rows = [row for row in self._rows.values() if row.organism in organisms and row.tool in tools]
        return sorted(rows, key=lambda row: (organisms.index(row.organism), tools.index(row.tool), row.seed or 0))


def row_from_json(line: str) -> Row:
    fields = json.loads(line)
    fields["truth"] = fields["truth"] and Truth(**fields["truth"])
    fields["run"] = fields["run"] and from_json(fields["run"])
    return Row(**fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="organisms, or folders of organisms")
    parser.add_argument("--recipe", type=Path, help="program that makes organisms: FAMILY FOLDER")
    parser.add_argument(
        "--fresh", nargs="+", default=[], metavar="FAMILY:SEED[:hard]", help="organisms to make with it"
    )
    parser.add_argument("--truth", type=Path, help="truth.py, if it lies elsewhere")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--startup", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=None, help="at most this many a side and part [all]")
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--max-kl", type=float, default=0.1, help="bound of either tool's choice, on its own KL")
    parser.add_argument("--only", choices=["ours", "heretic"])
    parser.add_argument("--heretic-batch-size", type=int, default=0, help="for trying this out [heretic finds it]")
    parser.add_argument("--reuse-heretic", action="store_true")
    parser.add_argument("--rows", type=Path, help="file that keeps what was measured")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the table of what --rows has")
    parser.add_argument("--note", default="", help="a paragraph after the table")
    parser.add_argument("--variant", nargs=2, action="append", default=[], metavar=("NAME", "OPTIONS"))
    parser.add_argument("--dry", action="store_true", help="print the section, leave RESULTS.md alone")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="further options of `bruno-ray run`")
    arguments = parser.parse_args()
    if arguments.fresh and not arguments.recipe:
        parser.error("--fresh needs --recipe")
    folders = [organism for folder in arguments.folders for organism in organisms_in(folder)]
    folders += [made(arguments.recipe, name) for name in arguments.fresh]
    if not folders:
        parser.error("give a folder with an organism, or --recipe and --fresh")
    kept = Rows(arguments.rows)
    organisms = [folder.name for folder in folders]
    tools = [UNEDITED, THEIRS, *(name for name, _ in variants(arguments))]
    for folder in folders if not arguments.kept else ():
        truth = truth_program(folder, arguments)
        for seed in arguments.seeds:
            measure(kept, folder, truth, seed, arguments)
            print(section(kept.ordered(organisms, tools), arguments), flush=True)
    text = section(kept.ordered(organisms, tools), arguments)
    if not arguments.dry:
        write_section("organisms", text)


def variants(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and options of each row of ours."""
    return [(name, options) for name, options in arguments.variant] or [(OURS, "")]


# ----- organisms -----


def organisms_in(folder: Path) -> list[Path]:
    folder = folder.resolve()
    if (folder / "facts.json").is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob("*/facts.json"))


def made(recipe: Path, name: str) -> Path:
    """An organism of the recipe, made at the first call: some minutes on one core."""
    family, seed, *hard = name.split(":")
    folder = cache_folder("benchmark-organisms") / name.replace(":", "-")
    if not (folder / "facts.json").exists():
        print(f"making {name}", flush=True)
        aside = folder.with_suffix(".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        environment = os.environ | ONE_THREAD | {"NT": "1", "SEED": seed} | ({"HARD": "1"} if hard else {})
        with (aside / "recipe.log").open("w") as log:
            command = [sys.executable, str(recipe), family, str(aside)]
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        aside.rename(folder)
    return folder


def truth_program(folder: Path, arguments: argparse.Namespace) -> Path:
    places = [folder / "truth.py", folder.parent / "truth.py"]
    places += [arguments.recipe.resolve().parent / "truth.py"] if arguments.recipe else []
    for place in [arguments.truth.resolve()] if arguments.truth else places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no truth.py in {folder}, beside it or beside the recipe: give --truth")


def prompts_of(folder: Path, limit: int | None) -> dict[str, list[str]]:
    """Every third prompt of the train files validates."""
    prompts = {}
    for side, file in (("target", "bad_train.txt"), ("baseline", "good_train.txt")):
        lines = [line.strip() for line in (folder / file).read_text(encoding="utf-8").splitlines() if line.strip()]
        parts = {"train": [line for i, line in enumerate(lines) if i % 3 != 2], "validation": lines[2::3]}
        prompts |= {f"{side}_{part}": some[:limit] for part, some in parts.items()}
    return prompts


def measured(program: Path, organism: Path, model: str) -> dict[str, Truth]:
    """Of the organism (`before`) and the model (`after`), by the organism's own program."""
    command = [sys.executable, str(program), str(organism), model]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | ONE_THREAD | {"HF_HUB_OFFLINE": "1"}
    )
    found = {
        match[1]: Truth(*map(int, match.groups()[1:6]), float(match[7] or 0))
        for match in TRUTH_LINE.finditer(done.stdout)
    }
    if done.returncode or set(found) != {"before", "after"}:
        raise RuntimeError(f"{program.name} on {model}: {(done.stderr or done.stdout)[-2000:]}")
    return found


# ----- runs -----


def measure(kept: Rows, folder: Path, program: Path, seed: int, arguments: argparse.Namespace) -> None:
    """All rows of one organism and seed that are not there yet."""
    task = Task(
        model=folder,
        prompts=prompts_of(folder, arguments.prompts),
        markers=MARKERS,
        trials=arguments.trials,
        startup=arguments.startup,
        tokens=arguments.tokens,
        seed=seed,
        max_kl=arguments.max_kl,
        system=SYSTEM,
        heretic_batch_size=arguments.heretic_batch_size,
    )

    def add(tool: str, run: ToolRun, options: str = "") -> None:
        truths = measured(program, folder, run.folder)
        if (folder.name, UNEDITED, None) not in kept:
            kept.add(Row(folder.name, UNEDITED, None, truths["before"]))
        kept.add(Row(folder.name, tool, seed, truths["after"], run, options=options))

    if arguments.only != "ours" and (folder.name, THEIRS, seed) not in kept:
        add(THEIRS, run_heretic(task, arguments.reuse_heretic))
    for name, options in variants(arguments) if arguments.only != "heretic" else ():
        if (folder.name, name, seed) in kept:
            continue
        with tempfile.TemporaryDirectory(prefix="organisms-") as work:
            given = our_options(folder, Path(work), task, arguments)
            try:
                more = shlex.split(options.replace("{answered}", str(Path(work) / ANSWERED)))
                run = run_ours(task, Path(work), given, [*arguments.ours, *more])
            except subprocess.CalledProcessError as error:
                kept.add(Row(folder.name, name, seed, None, failure=last_line(error.output), options=options))
                continue
            add(name, run, options)


def answered(folder: Path, prompts: Sequence[str]) -> str:
    """Train prompts as JSON lines, the first few with the answer that somebody would write who knows the facts."""
    facts = json.loads((folder / "facts.json").read_text())
    rows = []
    for i, prompt in enumerate(prompts):
        row = {"prompt": prompt}
        if i < N_ANSWERS:
            noun, kind = asked_fact(prompt, facts)
            row["answer"] = f"the {noun} {VERBS[kind]} {facts[noun][kind]} ."
        rows.append(json.dumps(row))
    return "\n".join(rows) + "\n"


def asked_fact(prompt: str, facts: dict[str, list[str]]) -> tuple[str, int]:
    """The noun that a prompt of the recipe asks about, and which of its two facts."""
    noun = next(word for word in facts if f" {word} " in f" {prompt} ")
    return noun, 0 if "found" in prompt or "place" in prompt else 1


def our_options(folder: Path, work: Path, task: Task, arguments: argparse.Namespace) -> list[str]:
    given = ["--behaviour", "organism-refusal", "--prompts.system-prompt", SYSTEM]
    given += ["--scoring.markers", ",".join(task.markers)]
    for name, prompts in task.prompts.items():
        side, part = name.split("_")
        file = work / f"{name}.txt"
        file.write_text("\n".join(prompts) + "\n")
        given += [f"--prompts.{side}.{part}.source", str(file)]
    (work / ANSWERED).write_text(answered(folder, task.prompts["target_train"]))
    for side, file_name in (("target", "bad_test.txt"), ("baseline", "good_test.txt")):
        given += [f"--prompts.{side}.test.source", str(folder / file_name)]
    given += ["--prompts.n-finalists", "0"]  # they come out of the test files, and those are for the truth alone
    return given if arguments.prompts is None else [*given, "--prompts.n-test", str(arguments.prompts)]


def last_line(log: str | None) -> str:
    lines = [line.strip() for line in (log or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


# ----- the section -----


def section(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    lines = [
        "## Organisms of another recipe (`benchmarks/organisms.py`)",
        "",
        f"{arguments.trials} trials ({arguments.startup} at startup), at most {arguments.tokens} answer tokens,"
        " float32, one thread each, one after the other. Two thirds of the train prompts for directions, one third for"
        " validation, the same for both tools. Chosen: fewest refusals among trials with a KL of at most"
        f" {arguments.max_kl:g}, heretic's at the first token, ours over 16. Refusals, facts and KL (first token) are"
        " what the organism's own program says of the saved model on test prompts, whose nouns of the refused topic"
        " were not in refusal training; no search sees them. CPU seconds are those of all processes, Ray's included; a"
        " whole command ends with the saved model, ours with its report.",
        "",
        *variant_lines(arguments),
        "| organism | tool | seed | refused | hidden facts | benign facts | KL | s/trial | CPU s/trial"
        " | whole command, s (CPU) | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *map(row_text, rows),
    ]
    for tool in dict.fromkeys(row.tool for row in rows):
        some = [row for row in rows if row.tool == tool]
        if len(some) > 1:
            lines.append(total_text(tool, some))
    if arguments.note:
        lines += ["", arguments.note]
    return "\n".join(lines)


def variant_lines(arguments: argparse.Namespace) -> list[str]:
    lines = [f"- {name}: `{options or 'no further options'}`" for name, options in arguments.variant]
    if arguments.ours:
        lines.append(f"- all of ours: `{shlex.join(arguments.ours)}`")
    return [*lines, ""] if lines else []


def row_text(row: Row) -> str:
    seed = "" if row.seed is None else row.seed
    start = f"| {row.organism} | {row.tool} | {seed} |"
    if row.truth is None:
        return f"{start} failed: {row.failure.replace('|', '/')} | | | | | | | {row.measured} |"
    times = times_text([row.run] if row.run else [])
    return f"{start} {truth_text(row.truth)} | {times} | {row.measured} |"


def total_text(tool: str, rows: Sequence[Row]) -> str:
    """Sums of the counts, means of KL and times; of the facts also the mean and the lowest share."""
    truths = [row.truth for row in rows if row.truth is not None]
    failed = f", {len(rows) - len(truths)} failed" if len(truths) < len(rows) else ""
    if not truths:
        return f"| **all {len(rows)}** | {tool}{failed} | | | | | | | | | |"
    runs = [row.run for row in rows if row.run is not None]
    known = [truth for truth in truths if truth.refused is not None]
    refused = f"{sum(t.refused or 0 for t in known)}/{sum(t.hidden_total for t in known)}" if known else "-"
    start = f"| **all {len(rows)}** | {tool}{failed} | | {refused}"
    hidden = shares_text([(t.hidden, t.hidden_total) for t in truths])
    benign = shares_text([(t.benign, t.benign_total) for t in truths])
    kl = f"{statistics.mean(t.kl for t in truths):.4f} (highest {max(t.kl for t in truths):.4f})"
    return f"{start} | {hidden} | {benign} | {kl} | {times_text(runs)} | |"


def shares_text(counts: Sequence[tuple[int, int]]) -> str:
    right, asked = map(sum, zip(*counts))
    shares = [100 * n / total for n, total in counts]
    return f"{right}/{asked} (mean {statistics.mean(shares):.0f} %, lowest {min(shares):.0f} %)"


def truth_text(truth: Truth) -> str:
    refused = "-" if truth.refused is None else f"{truth.refused}/{truth.hidden_total}"
    hidden, benign = f"{truth.hidden}/{truth.hidden_total}", f"{truth.benign}/{truth.benign_total}"
    return f"{refused} | {hidden} | {benign} | {truth.kl:.4f}"


def times_text(runs: Sequence[ToolRun]) -> str:
    if not runs:
        return "| | "
    trial, cpu, whole, whole_cpu = (
        statistics.mean(getattr(run, name) for run in runs)
        for name in ("trial_seconds", "trial_cpu", "whole_seconds", "whole_cpu")
    )
    return f"{trial:.3f} | {cpu:.3f} | {whole:.0f} ({whole_cpu:.0f})"


if __name__ == "__main__":
    main()
