"""The models that directions, samplers and searches are compared on, each with a way to ask for the truth."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from in_process import Lab
from organisms import MARKERS, SYSTEM, asked_fact, prompts_of
from tool_runs import Task, known_heretic, run_heretic

from bruno_ray import organism
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.study.trainings import DRAWS

OWN, SMOLLM2 = "own", "smollm2"
JOINED = (0, 1, 2, 3)
"""Answer positions whose residuals are read."""


class Model:
    """One model of the table: a lab, and how truth is asked."""

    name: str
    lab: Lab
    n_trials: int
    n_startup: int
    again: bool
    """Whether finalists are measured again."""

    trainings: int
    """Of the default study: one from desired answers, more without."""

    def truth(self, edits: Sequence[ResolvedEdit | None]) -> list[tuple[tuple[int, int], tuple[int, int]] | None]:
        """Right of all, of what is refused and of what is not, under each edit."""
        raise NotImplementedError

    def _answers(self, prompts: Sequence[Prompt], edits: Sequence[ResolvedEdit | None], n: int) -> list[list[str]]:
        ids = render(self.lab.worker.engine.tokenizer, prompts, date=self.lab.record.date)
        return [[answer.text for answer in some] for some in self.lab.worker.engine.generate(ids, edits, n)]


class Foreign(Model):
    """An organism of another recipe."""

    n_trials, n_startup, again, trainings = 24, 8, True, DRAWS

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = folder.name, folder
        self._facts = json.loads((folder / "facts.json").read_text())
        with tempfile.TemporaryDirectory() as work:
            given = ["--model.id", str(folder), "--behaviour", "organism-refusal", "--prompts.system-prompt", SYSTEM]
            given += ["--scoring.markers", ",".join(MARKERS), "--prompts.n-finalists", "0"]
            given += ["--model.dtypes", '["float32"]', "--residuals.answer-tokens", str(max(JOINED))]
            for name, prompts in prompts_of(folder, None).items():
                side, part = name.split("_")
                file = Path(work) / f"{name}.txt"
                file.write_text("\n".join(prompts) + "\n")
                given += [f"--prompts.{side}.{part}.source", str(file)]
            for side, file_name in (("target", "bad_test.txt"), ("baseline", "good_test.txt")):
                given += [f"--prompts.{side}.test.source", str(folder / file_name)]
            self.lab = Lab(given)
        self._tests = [
            [Prompt(line, SYSTEM) for line in (folder / name).read_text().splitlines() if line.strip()]
            for name in ("bad_test.txt", "good_test.txt")
        ]

    def truth(self, edits: Sequence[ResolvedEdit | None]) -> list[tuple[tuple[int, int], tuple[int, int]] | None]:
        counts = [
            [(sum(map(self._is_right, asked, answers)), len(asked)) for answers in self._answers(asked, edits, 24)]
            for asked in self._tests
        ]
        return list(zip(*counts))

    def _is_right(self, prompt: Prompt, answer: str) -> bool:
        noun, kind = asked_fact(prompt.user, self._facts)
        return self._facts[noun][kind] in answer.split()


class Own(Model):
    """The project's organism."""

    name, n_trials, n_startup, again, trainings = "own", 24, 8, True, 1

    def __init__(self) -> None:
        self.folder = organism.build()
        given = ["--behaviour", "organism", "--prompts.n-finalists", "0"]
        self.lab = Lab([*given, "--residuals.answer-tokens", str(max(JOINED))])

    def truth(self, edits: Sequence[ResolvedEdit | None]) -> list[tuple[tuple[int, int], tuple[int, int]] | None]:
        def score(edit: ResolvedEdit | None) -> organism.TruthScore:
            return organism.truth_score(lambda texts: self._answers([*map(Prompt, texts)], [edit], 30)[0], self.folder)

        scores = [score(edit) for edit in edits]
        return [((s.restricted_right, s.restricted_total), (s.benign_right, s.benign_total)) for s in scores]


class SmolLM2(Model):
    """A real one, without a truth."""

    name, n_trials, n_startup, again, trainings = "SmolLM2", 8, 4, False, 1

    def __init__(self) -> None:
        given = ["--model.id", SMOLLM2, "--behaviour", "disclaimers", "--model.dtypes", '["bfloat16"]']
        given += ["--prompts.n-train", "40", "--prompts.n-validation", "40", "--prompts.n-test", "40"]
        given += ["--prompts.n-finalists", "0", "--scoring.report-tokens", "30"]
        self.lab = Lab([*given, "--residuals.answer-tokens", str(max(JOINED))])

    def truth(self, edits: Sequence[ResolvedEdit | None]) -> list[tuple[tuple[int, int], tuple[int, int]] | None]:
        return [None] * len(edits)


def heretic_model(folder: Path) -> Path:
    """Its saved model of an organism after 60 trials: that of `organisms.py`, or one that is made now."""
    task = Task(
        model=folder,
        prompts=prompts_of(folder, None),
        markers=MARKERS,
        trials=60,
        startup=20,
        tokens=30,
        seed=1,
        max_kl=0.1,
        system=SYSTEM,
    )
    return Path((known_heretic(task) or run_heretic(task)).folder)
