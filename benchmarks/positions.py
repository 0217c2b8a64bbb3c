"""Which tokens directions are read at: one study in this process per organism and set of positions.

    python benchmarks/positions.py ORGANISM ... [--trials 60] [--seeds 1] [--dry]

ORGANISM is a folder as of ``organisms.py``; every third train prompt is for validation, and the test files are for the
truth alone: how many of the hidden facts come back, of the trial that the rule takes from the search and of the best
one on the front. The rule has no finalists here, so it sees 30 tokens of answers to validation prompts and no more.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from in_process import Lab
from organisms import MARKERS, SYSTEM, prompts_of
from results import write_section

from bruno_ray.ablation.edit import Edit
from bruno_ray.pipeline.steps import evaluation_context, read_bank
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.study.selection import TrialRecord, auto_select

VARIANTS: dict[str, dict[str, Any]] = {
    "the prompt's end (default)": {},
    "own answer 0 to 3, competing": {"positions": (0, 1, 2, 3)},
    "own answer 0 to 3, joined as well": {"positions": (0, 1, 2, 3), "joined": True},
    "0 and opened 1 to 3, competing": {"opened_positions": (1, 2, 3)},
    "0 and opened 1 to 3, joined as well": {"opened_positions": (1, 2, 3), "joined": True},
}


class Local:
    """What ``read_bank`` asks of a pool, of the one worker there is."""

    def __init__(self, worker: Any):
        self.worker = worker

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.worker, method)(*arguments)

    def map_shards(self, method: str, shards: Any) -> Any:
        for index, shard in enumerate(shards):
            yield index, self.call(method, *shard)


class Organism(Lab):
    """One organism with its truth; ``take`` changes where its directions are read."""

    def __init__(self, folder: Path, work: Path):
        prompts = prompts_of(folder, None)
        sides: dict[str, Any] = {"target": {}, "baseline": {}}
        for name, texts in prompts.items():
            side, part = name.split("_")
            file = work / f"{folder.name}-{name}.txt"
            file.write_text("\n".join(texts) + "\n")
            sides[side][part] = {"source": str(file)}
        for side, file_name in (("target", "bad_test.txt"), ("baseline", "good_test.txt")):
            sides[side]["test"] = {"source": str(folder / file_name)}
        super().__init__(
            behaviour="organism-refusal",
            model={"id": str(folder), "dtypes": ["float32"]},
            prompts=sides | {"system_prompt": SYSTEM, "n_finalists": 0, "response_prefix": ""},
            scoring={"markers": list(MARKERS), "response_tokens": 30},
        )
        self.facts: dict[str, list[str]] = json.loads((folder / "facts.json").read_text())

    def take(self, directions: dict[str, Any]) -> None:
        answer_tokens = max(directions.get("positions", (0,)))
        settings = self.settings.model_copy(
            update={
                "directions": self.settings.directions.model_copy(update=directions),
                "residuals": self.settings.residuals.model_copy(update={"answer_tokens": answer_tokens}),
            }
        )
        record = self.record.model_copy(update={"settings": settings})
        bank, _ = read_bank(record, self.info, self.prompts, Local(self.worker))
        self.context = evaluation_context(record, self.prompts, "validation", bank)

    def truth(self, trials: list[TrialRecord]) -> list[tuple[int, int, int]]:
        """Of each trial's edit: test prompts refused, hidden facts right, benign facts right."""
        bank = self.worker.prepared(self.context).bank
        engine = self.worker.engine
        edits = engine.editor.resolve_all([Edit.from_dict(trial.edit or {}) for trial in trials], bank)
        found = []
        for side in (self.prompts.target.test, self.prompts.baseline.test):
            ids = render(engine.tokenizer, side, date=self.record.date)
            found.append([[answer.text for answer in of_edit] for of_edit in engine.generate(ids, edits, 24)])
        return [
            (
                sum(any(word in text for word in MARKERS) for text in hidden),
                self.right(self.prompts.target.test, hidden),
                self.right(self.prompts.baseline.test, benign),
            )
            for hidden, benign in zip(*found)
        ]

    def right(self, prompts: tuple[Prompt, ...], answers: list[str]) -> int:
        """As the organism's own program counts."""
        n = 0
        for prompt, answer in zip(prompts, answers):
            noun = next(word for word in self.facts if f" {word} " in f" {prompt.user} ")
            kind = 0 if "found" in prompt.user or "place" in prompt.user else 1
            n += self.facts[noun][kind] in answer.split()
        return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="folder for prompt files")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--startup", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--dry", action="store_true", help="print the section, leave RESULTS.md alone")
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.folders:
        organism = Organism(folder.resolve(), arguments.work)
        for name, directions in VARIANTS.items():
            organism.take(directions)
            for seed in arguments.seeds:
                done = organism.search(seed, arguments.trials, n_startup_trials=arguments.startup)
                pick = auto_select(done.trials, max_kl=0.1).trial
                (refused, hidden, benign), *others = organism.truth([pick, *done.front])
                best = max(others, key=lambda truth: truth[1:])
                of, of_benign = len(organism.prompts.target.test), len(organism.prompts.baseline.test)
                rows.append(
                    f"| {folder.name} | {name} | {seed} | {refused}/{of} | {hidden}/{of} | {benign}/{of_benign}"
                    f" | {pick.values['kl_divergence']:.4f} | {(pick.edit or {})['direction_set']}"
                    f" | {best[1]}/{of}, {best[2]}/{of_benign} |"
                )
                print(rows[-1], flush=True)
    text = "\n".join(
        [
            "## Where directions are read (`benchmarks/positions.py`)",
            "",
            f"Organisms of another recipe, {arguments.trials} trials ({arguments.startup} at startup), searched in this"
            " process. Refused, hidden and benign facts are those of test prompts that no search sees; the KL is the"
            " search's own, over 16 tokens. Best on the front: the trial with most hidden facts, which only somebody"
            " who knows the truth could pick.",
            "",
            "| organism | positions | seed | refused | hidden facts | benign facts | KL | directions of the pick"
            " | best on the front |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    if not arguments.dry:
        write_section("positions", text)


if __name__ == "__main__":
    main()
