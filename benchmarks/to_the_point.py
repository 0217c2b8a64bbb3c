"""How well `to_the_point` agrees with labels by hand: python -m benchmarks.to_the_point [--dry]

The labels (examples/disclaimers/labelled_edits.jsonl) are of answers to test prompts by four edits of SmolLM2, of one
study, with between 1 and 29 of 100 marked answers; somebody read each and said whether it takes up the request. The
scorer is prepared on the unedited model's answers to the validation prompts, as in a study, at the labelled answers'
length.
"""

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import write_section
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.loading import load_model
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.scoring.agreement import Agreement
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.to_the_point import ToThePoint
from bruno_ray.settings import ModelSettings
from bruno_ray.settings.sources import load

LABELS = Path(__file__).parents[1] / "examples" / "disclaimers" / "labelled_edits.jsonl"
N_TOKENS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="print the section without touching RESULTS.md")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]
    labels = [not row["to_the_point"] for row in rows]
    lines = [
        "## Answers to the point, against labels by hand (`python -m benchmarks.to_the_point`)",
        "",
        f"{len(rows)} answers of four edits of SmolLM2 to test prompts of `disclaimers`, {N_TOKENS} tokens, of which"
        f" {sum(labels)} are evasions by hand. Precision and recall are those of finding evasions.",
        "",
        "| what counts as an evasion | kappa | agreement | precision | recall |",
        "|---|---|---|---|---|",
        *(row_of(name, labels, verdicts) for name, verdicts in readings(rows).items()),
    ]
    if arguments.dry:
        print("\n".join(lines))
    else:
        write_section("to_the_point", "\n".join(lines))


def readings(rows: Sequence[dict]) -> dict[str, list[bool]]:
    settings = load(["--behaviour", "disclaimers"], environ={}).settings
    prompts = load_prompts(settings)
    engine = BatchEngine(load_model(ModelSettings(id="smollm2")))
    scoring = settings.scoring.model_copy(update={"response_tokens": N_TOKENS})
    sides = prompts.target.validation, prompts.baseline.validation
    unedited = Evaluation(
        engine, ScoringPrompts.rendered(engine, *sides, date=datetime.date.today()), scoring, whole=True
    )
    scorer = ToThePoint(scoring)
    scorer.prepare(unedited)
    asked = tuple(Prompt(row["prompt"]) for row in rows)
    edited = Evaluation(engine, ScoringPrompts(asked, (), ((),) * len(rows), ()), scoring)
    ids = engine.tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
    edited.target_answers = [[Response(tuple(tokens), row["answer"], row["ended"]) for tokens, row in zip(ids, rows)]]
    alike = unedited.reads_like_behaviour([(row["prompt"], row["answer"]) for row in rows])
    marked = edited.marked[0]
    (scores,) = scorer.score(edited)
    return {
        "a marker": marked,
        "a marker, or it reads like the behaviour": [a or b for a, b in zip(marked, alike)],
        "`evasion_rate`": [bool(case) for case in scores.rows["evasion_rate"]],
    }


def row_of(name: str, labels: Sequence[bool], verdicts: Sequence[bool]) -> str:
    found = Agreement.of(labels, verdicts)
    same = sum(a == b for a, b in zip(labels, verdicts))
    return (
        f"| {name} | {found.kappa:.2f} | {same}/{len(labels)} | {found.both}/{found.both + found.reader_only}"
        f" | {found.both}/{found.both + found.label_only} |"
    )


if __name__ == "__main__":
    main()
