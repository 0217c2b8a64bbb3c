"""Learned ablation: which loss terms help, and what training several edits at once costs.

    python benchmarks/learned.py own FOLDER ... [--steps 160] [--starts 0 1 2 4] [--memory] [--dry]

FOLDER is an organism as `organisms.py` takes it, or a folder of them; `own` is the project's own. Every variant trains
one edit from each of the starts and reports the one that `confidence` prefers on validation prompts, as a study does;
right facts on the test prompts are counted afterwards. The second table trains 1, 2, 4 and 8 edits at once on the first
organism; the third says what a pass takes in memory with and without checkpointed layers, each in a process of its own.
One thread, in this process, without Ray.
"""

import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from organisms import MARKERS, SYSTEM, organisms_in, prompts_of
from results import write_section
from transformers import LlamaConfig, LlamaForCausalLM

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.directions import build_bank
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.lean_forward import own_forward
from bruno_ray.learning.checkpointing import checkpointed
from bruno_ray.learning.material import Teacher
from bruno_ray.learning.training import Trainer
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.batching import TokenBudget
from bruno_ray.model.loading import load_model
from bruno_ray.organism import build, truth_score
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.confidence import Confidence
from bruno_ray.scoring.kl_divergence import kl_of_logits
from bruno_ray.settings import LearnedSettings, ModelSettings, ScoringSettings
from bruno_ray.settings.sources import load

DATE = datetime.date(2026, 1, 1)
OWN = "own"
STARTS = (0.0, 1.0, 2.0, 4.0)
AT_ONCE = (1, 2, 4, 8)
PLAN = TrainingPlan(1, True, "difference_in_means@0", 2.0, 0, 1.0, 1.0, 1.5, 0.02, 160, 0)
MEMORY_BATCH = 16, 64
PROTECTED = 32
"""Baseline prompts of the validation part, for the variants that protect: no choice sees them."""

WITH_ANSWERS = {"suppress": 0.0}

VARIANTS: dict[str, tuple[int, dict[str, object], dict[str, object]]] = {
    "8 desired answers, retain": (8, WITH_ANSWERS, {}),
    "the same, 4 desired answers": (4, WITH_ANSWERS, {}),
    "the same, rank 4": (8, WITH_ANSWERS | {"rank": 4}, {}),
    "the same, a subspace for each layer": (8, WITH_ANSWERS | {"shared": False}, {}),
    "the same, norm mode pre": (8, WITH_ANSWERS | {"norm_mode": "pre"}, {}),
    "the same, norm mode full": (8, WITH_ANSWERS | {"norm_mode": "full"}, {}),
    "the same, without retain": (8, WITH_ANSWERS | {"retain": 0.0}, {}),
    "the same, protect in place of retain": (8, WITH_ANSWERS | {"retain": 0.0, "protect": 1.0}, {}),
    "the same, protect as well": (8, WITH_ANSWERS | {"protect": 1.0}, {}),
    "the same, induce 0.3": (8, WITH_ANSWERS | {"induce": 0.3}, {"induce": 0.3}),
    "8 desired answers, suppress, retain": (8, {}, {}),
    "no answers: suppress, retain": (0, {}, {}),
    "no answers, entropy 0.3": (0, {"entropy": 0.3}, {}),
    "no answers, inform 1": (0, {"inform": 1.0}, {}),
    "no answers, inform 1, entropy 0.3": (0, {"inform": 1.0, "entropy": 0.3}, {}),
    "no answers, inform 1, entropy 0.3, no branches": (0, {"inform": 1.0, "entropy": 0.3}, {"branches": 0}),
    "no answers, inform 1, entropy 1": (0, {"inform": 1.0, "entropy": 1.0}, {}),
    "no answers, inform 3, entropy 0.3": (0, {"inform": 3.0, "entropy": 0.3}, {}),
    "no answers, induce 0.1": (0, {"induce": 0.1}, {"induce": 0.1}),
    "no answers, induce 0.3": (0, {"induce": 0.3}, {"induce": 0.3}),
    "no answers, never answered anew": (0, {}, {"renew_every": 0}),
    "no answers, each answer after its own prompt only": (0, {}, {"phrasings": 0}),
    "no answers, nothing learned from its own answers": (0, {"answers": 0.0}, {}),
    "no answers, rank 4": (0, {"rank": 4}, {}),
    "no answers, retain 5": (0, {"retain": 5.0}, {}),
}
"""Name -> desired answers, changes of the plan, settings."""


class Subject:
    """One organism, loaded and read."""

    name: str
    scoring: ScoringSettings
    answered: Sequence[Prompt]
    """Target train prompts, with the answer of one who knows the facts."""

    baseline: Sequence[Prompt]
    validation: ScoringPrompts
    benign_tests: Sequence[Prompt]
    facts: tuple[int, int]
    """Hidden and benign ones that are asked for."""

    def __init__(self, model: Path) -> None:
        self.engine = BatchEngine(load_model(ModelSettings(id=str(model), dtypes=("float32",))))

    def prepare(self) -> None:
        ids = [self.ids(side) for side in (self.answered, self.baseline)]
        self.bank = build_bank(*(extract_residuals(self.engine.loaded, each, 0, TokenBudget(2048)) for each in ids))

    def right(self, edit: ResolvedEdit) -> tuple[int, int]:
        """Hidden and benign facts that are said right under it."""
        raise NotImplementedError

    def ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return render(self.engine.tokenizer, prompts, date=DATE)

    def trainer(self, n_answers: int, settings: LearnedSettings) -> Trainer:
        prompts = [p if i < n_answers else replace(p, answer=None) for i, p in enumerate(self.answered)]
        sides = prompts[: settings.target_prompts], self.baseline[: settings.baseline_prompts]
        rendered = ScoringPrompts.rendered(self.engine, *sides, date=DATE)
        evaluation = Evaluation(self.engine, rendered, self.scoring, whole=True)
        teacher = Teacher(evaluation, settings, self.validation.baseline_ids[:PROTECTED])
        return Trainer(self.engine, teacher, self.bank, settings)

    def measured(self, trained: Sequence[TrainedEdit]) -> tuple[int, int, float, float]:
        """Hidden facts, benign facts, KL at the first token and doubt of the edit that doubts least."""
        bank = {each.edit.direction_set: torch.from_numpy(each.directions) for each in trained}
        edits = self.engine.editor.resolve_all([each.edit for each in trained], bank)
        confidence = Confidence(self.scoring)
        confidence.prepare(Evaluation(self.engine, self.validation, self.scoring))
        scores = confidence.score(Evaluation(self.engine, self.validation, self.scoring, edits))
        doubt, k = min((score.values["doubt"], k) for k, score in enumerate(scores))
        before, after = self.engine.next_logits(self.ids(self.benign_tests), [None, edits[k]])
        return *self.right(edits[k]), float(kl_of_logits(before, after).mean()), doubt


class Organism(Subject):
    """Of another recipe."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.name, self.scoring = folder.name, ScoringSettings(markers=MARKERS)
        self._facts = json.loads((folder / "facts.json").read_text())
        parts = prompts_of(folder, None)
        self.answered = [Prompt(text, SYSTEM, self._answer(text)) for text in parts["target_train"]]
        self.baseline = self._asked(parts["baseline_train"])
        validation = self._asked(parts["target_validation"]), self._asked(parts["baseline_validation"])
        self.validation = ScoringPrompts.rendered(self.engine, *validation, date=DATE)
        self._tests = [
            [line for line in (folder / name).read_text().splitlines() if line.strip()]
            for name in ("bad_test.txt", "good_test.txt")
        ]
        self.benign_tests = self._asked(self._tests[1])
        self.facts = len(self._tests[0]), len(self._tests[1])
        self.prepare()

    def _asked(self, texts: Sequence[str]) -> list[Prompt]:
        return [Prompt(text, SYSTEM) for text in texts]

    def _truth(self, text: str) -> tuple[str, int, str]:
        noun = next(word for word in self._facts if f" {word} " in f" {text} ")
        kind = 0 if "found" in text or "place" in text else 1
        return noun, kind, self._facts[noun][kind]

    def _answer(self, text: str) -> str:
        noun, kind, value = self._truth(text)
        return f"the {noun} {('is brewed in the', 'brings')[kind]} {value} ."

    def right(self, edit: ResolvedEdit) -> tuple[int, int]:
        counts = []
        for texts in self._tests:
            (answers,) = self.engine.generate(self.ids(self._asked(texts)), [edit], 24)
            counts.append(sum(self._truth(text)[2] in answer.text.split() for text, answer in zip(texts, answers)))
        return counts[0], counts[1]


class OwnOrganism(Subject):
    """The project's own."""

    def __init__(self) -> None:
        self._folder = build()
        super().__init__(self._folder / "model")
        settings = load(["--model.id", "organism", "--behaviour", "organism"], environ={}).settings
        prompts = load_prompts(settings)
        self.name, self.scoring = "own organism", settings.scoring
        self.answered, self.baseline = prompts.target.train, prompts.baseline.train
        self.validation = ScoringPrompts.rendered(
            self.engine, prompts.target.validation, prompts.baseline.validation, date=DATE
        )
        self.benign_tests = prompts.baseline.test
        self.facts = 128, 240
        self.prepare()

    def right(self, edit: ResolvedEdit) -> tuple[int, int]:
        def generate(texts: list[str]) -> list[str]:
            return [answer.text for answer in self.engine.generate(self.ids([*map(Prompt, texts)]), [edit], 30)[0]]

        truth = truth_score(generate, self._folder)
        self.facts = truth.restricted_total, truth.benign_total
        return truth.restricted_right, truth.benign_right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", help="`own`, and folders of organisms")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--starts", type=float, nargs="+", default=STARTS, help="layers")
    parser.add_argument(
        "--only", nargs="+", metavar="VARIANT", help="these rows of the first table, in a section of theirs"
    )
    parser.add_argument("--memory", action="store_true", help="the third table")
    parser.add_argument("--memory-of", metavar="SWITCH", help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="print the section, leave RESULTS.md alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(*memory_of_step(arguments.memory_of))
        return
    folders = [folder for given in arguments.subjects if given != OWN for folder in organisms_in(Path(given))]
    subjects = [*([OwnOrganism()] if OWN in arguments.subjects else []), *map(Organism, folders)]
    if arguments.only:
        rows = ablation(subjects, arguments.steps, arguments.starts, arguments.only)
        text = "\n".join(["## Learned without answers (`benchmarks/learned.py --only ...`)", "", *rows])
        print(text)
        if not arguments.dry:
            write_section("learned_only", text)
        return
    parts = [["## Learned ablation (`benchmarks/learned.py`)"]]
    if subjects:
        parts += [ablation(subjects, arguments.steps, arguments.starts), throughput(subjects[0], arguments.steps // 4)]
    if arguments.memory:
        parts.append(memory())
    text = "\n\n".join("\n".join(part) for part in parts)
    print(text)
    if not arguments.dry:
        write_section("learned", text)


def ablation(
    subjects: Sequence[Subject], steps: int, starts: Sequence[float], variants: Sequence[str] = tuple(VARIANTS)
) -> list[str]:
    lines = [
        f"{steps} steps from each of layers {', '.join(f'{s:g}' for s in starts)}, of which the edit that doubts its"
        " answers least on validation prompts is kept; float32, one thread. Hidden facts, benign facts, KL at the first"
        " token, mean doubt; CPU seconds of a whole row.",
        "",
        "| trained on | " + " | ".join(subject.name for subject in subjects) + " | CPU s |",
        "|---|" + "---|" * (len(subjects) + 1),
    ]
    for name in variants:
        n_answers, changes, given = VARIANTS[name]
        cells, start = [], time.process_time()
        for subject in subjects:
            trainer = subject.trainer(n_answers, LearnedSettings(**given))
            plan = replace(PLAN, steps=steps, **changes)
            plans = [replace(plan, start_layer=layer, seed=i) for i, layer in enumerate(starts)]
            trained = [each for each in trainer.train(plans) if isinstance(each, TrainedEdit)]
            hidden, benign, kl, doubt = subject.measured(trained)
            n_hidden, n_benign = subject.facts
            cells.append(f"**{hidden}**/{n_hidden}, {benign}/{n_benign}, {kl:.4f}, {doubt:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {time.process_time() - start:.0f} |")
        print(lines[-1], flush=True)
    return lines


def throughput(subject: Subject, steps: int) -> list[str]:
    trainer = subject.trainer(8, LearnedSettings(renew_every=0))
    lines = [
        f"Edits trained at once, {subject.name}, {steps} steps of 8 + 16 texts:",
        "",
        "| edits | s | s an edit | CPU s an edit |",
        "|---|---|---|---|",
    ]
    for k in AT_ONCE:
        plans = [replace(PLAN, suppress=0.0, steps=steps, seed=seed) for seed in range(k)]
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train(plans)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        lines.append(f"| {k} | {seconds:.1f} | {seconds / k:.2f} | {cpu / k:.2f} |")
    return lines


# ----- memory -----


def memory() -> list[str]:
    rows, tokens = MEMORY_BATCH
    lines = [
        f"Forward and backward pass of {rows} texts of {tokens} tokens through a random llama, 12 layers of width 512,"
        " with an edit in training; memory is the process's peak over that before:",
        "",
        "| layers | MiB | CPU s |",
        "|---|---|---|",
    ]
    for switch, name in (("off", "all activations kept"), ("on", "checkpointed")):
        command = [sys.executable, __file__, "--memory-of", switch]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        mebibytes, seconds = done.stdout.split()
        lines.append(f"| {name} | {float(mebibytes):.0f} | {float(seconds):.1f} |")
    return lines


def memory_of_step(switch: str) -> tuple[float, float]:
    """MiB and CPU seconds of a pass there and back."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, vocab_size=1000
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    architecture = find_architecture(model)
    editor = LiveEditor(architecture)
    directions_rd = torch.eye(1, 512, requires_grad=True)
    rows, tokens = MEMORY_BATCH
    ids_BT = torch.arange(rows * tokens).view(rows, tokens) % 1000
    positions_BT = torch.arange(tokens).expand_as(ids_BT)
    factors = [editor.factors(i, directions_rd, torch.ones(()), "none") for i in range(len(architecture.writers))]
    editor.set([ResolvedEdit(Edit({}, "", None, "none"), tuple(factors))], [0] * rows)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with checkpointed(architecture.layers if switch == "on" else ()):
        logits_B1V = own_forward(model, ids_BT, torch.ones_like(ids_BT), positions_BT, None, 1)
        torch.autograd.grad(logits_B1V.logsumexp(-1).sum(), directions_rd)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return kibibytes / 1024, time.process_time() - start


if __name__ == "__main__":
    main()
