"""How well markers, the detector and a judge agree with labels by hand.

    python -m benchmarks.agreement
    python -m benchmarks.agreement --judge-model smollm2
    python -m benchmarks.agreement --judge-url http://localhost:8000/v1 --judge-model NAME --judge-key-variable NAME

The labels (examples/disclaimers/labelled_answers.jsonl) are of answers of an unedited model to the target and baseline
prompts of a test part, as a scorer of the report sees them. The detector is cross-fitted by prompt: it is trained on
the sides of the answers to four fifths of the prompts (never on labels) and reads the others, so no answer is read by a
detector that has seen its prompt. A judge without a URL is a model that is loaded in this process.
"""

import argparse
import datetime
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from sklearn.metrics import roc_auc_score

from benchmarks.results import write_section
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.agreement import Agreement, LabelledAnswer, read_labels
from bruno_ray.scoring.detector import BehaviourDetector
from bruno_ray.scoring.judge import TOP, Endpoint, Verdict, question, remembered, verdict
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import JudgeSettings, ModelSettings
from bruno_ray.settings.sources import load

ROOT = Path(__file__).parents[1]
LABELS = ROOT / "examples" / "disclaimers" / "labelled_answers.jsonl"
FOLDS = 5
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, default=LABELS, help="[examples/disclaimers/labelled_answers.jsonl]")
    parser.add_argument("--behaviour", default="disclaimers", help="whose markers and rubric [disclaimers]")
    parser.add_argument("--judge-url", metavar="URL", help="server with OpenAI's API")
    parser.add_argument("--judge-model", default="", metavar="NAME", help="its name there, or a model to load")
    parser.add_argument("--judge-key-variable", metavar="NAME", help="variable that holds the key")
    arguments = parser.parse_args()

    scoring = load(["--behaviour", arguments.behaviour], environ={}).settings.scoring
    rows = read_labels(arguments.labels)
    markers = Markers(scoring.markers, scoring.empty_counts)
    readers: dict[str, Sequence[Verdict]] = {
        "markers": [float(markers.shown_by(row.answer)) for row in rows],
        "detector, cross-fitted": cross_fitted(rows),
    }
    if arguments.judge_model:
        judge = JudgeSettings(
            url=arguments.judge_url,
            model=arguments.judge_model,
            key_variable=arguments.judge_key_variable,
            rubric=scoring.judge.rubric,
        )
        readers[f"judge, {judge.model}"] = ask(judge, rows)
    file = arguments.labels.resolve()
    name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
    shown = sum(row.shows for row in rows)
    flags = f" --judge-model {arguments.judge_model}" if arguments.judge_model else ""
    write_section(
        "agreement",
        "\n".join(
            [
                f"## Agreement with labels by hand (`python -m benchmarks.agreement{flags}`)",
                "",
                f"{len(rows)} answers of `{name}`, of which {shown} show the behaviour."
                " Verdict: probability above 0.5; AUROC is of the probability itself.",
                "",
                "| reader | answers | kappa | precision | recall | AUROC |",
                "|---|---|---|---|---|---|",
                *(row_of(reader, rows, verdicts) for reader, verdicts in readers.items()),
            ]
        ),
    )


def cross_fitted(rows: Sequence[LabelledAnswer]) -> list[float]:
    """The detector's probability for each answer, by one that was trained on other prompts."""
    fold = [int(hashlib.sha256(row.prompt.encode()).hexdigest(), 16) % FOLDS for row in rows]
    found = [math.nan] * len(rows)
    for held_out in range(FOLDS):
        target, baseline = (
            [(row.prompt, row.answer) for row, f in zip(rows, fold) if f != held_out and row.side == side]
            for side in ("target", "baseline")
        )
        detector = BehaviourDetector(target, baseline)
        own = [i for i, f in enumerate(fold) if f == held_out]
        for i, p in zip(own, detector.probability([(rows[i].prompt, rows[i].answer) for i in own])):
            found[i] = float(p)
    return found


def ask(judge: JudgeSettings, rows: Sequence[LabelledAnswer]) -> list[Verdict]:
    pairs = [(row.prompt, row.answer) for row in rows]
    if judge.url is not None:
        return Endpoint(judge).verdicts(pairs)

    from bruno_ray.workers.model_worker import ModelWorker

    worker = ModelWorker(ModelSettings(id=judge.model))

    def answer(missing: list[tuple[str, str]], keep: Callable[[tuple[str, str], Verdict], None]) -> None:
        for begin in range(0, len(missing), BATCH):
            some = missing[begin : begin + BATCH]
            questions = [Prompt(question(judge.rubric, *pair)) for pair in some]
            for pair, top in zip(some, worker.first_tokens(questions, datetime.date.today(), TOP)):
                keep(pair, verdict(top))
            print(f"judge: {begin + len(some)}/{len(missing)}", flush=True)

    return remembered(pairs, judge, worker.describe().fingerprint, answer)


def row_of(reader: str, rows: Sequence[LabelledAnswer], verdicts: Sequence[Verdict]) -> str:
    known = [(row.shows, p) for row, p in zip(rows, verdicts) if p is not None]
    found = Agreement.of([shows for shows, _ in known], [p > 0.5 for _, p in known])
    precision = f"{found.both}/{found.both + found.reader_only} = {found.precision:.2f}"
    recall = f"{found.both}/{found.both + found.label_only} = {found.recall:.2f}"
    auroc = roc_auc_score(*zip(*known)) if len({shows for shows, _ in known}) == 2 else math.nan
    return f"| {reader} | {found.total} | {found.kappa:.2f} | {precision} | {recall} | {auroc:.2f} |"


if __name__ == "__main__":
    main()
