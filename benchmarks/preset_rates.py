"""How often a model shows a preset's behaviour: both sides, all three parts, as in docs/behaviours.md.

    python -m benchmarks.preset_rates disclaimers --model smollm2 --tokens 64 --answers answers.jsonl

Greedy answers of the unedited model. Answers that are in the file already are not generated again, so that markers can
be changed and the table printed anew; read the answers that it lists as exceptions before trusting a rate.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.loading import load_model
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import ModelSettings
from bruno_ray.settings.sources import load

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("behaviour")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer [64]")
    parser.add_argument("--answers", type=Path, default=Path("answers.jsonl"), help="file of answers [answers.jsonl]")
    parser.add_argument("--parts", default="train,validation,test")
    parser.add_argument("--limit", type=int, default=None, help="first prompts of each part only [all]")
    parser.add_argument("--exceptions", action="store_true", help="print target answers without and baseline with")
    arguments = parser.parse_args()
    settings = load(["--behaviour", arguments.behaviour], environ={}).settings
    prompts = load_prompts(settings)
    markers = Markers(settings.scoring.markers, settings.scoring.empty_counts)
    parts = {
        (part, side): getattr(getattr(prompts, side), part)[: arguments.limit]
        for part in arguments.parts.split(",")
        for side in ("target", "baseline")
    }
    answers = answered(
        [p for part in parts.values() for p in part], arguments.model, arguments.tokens, arguments.answers
    )
    print("| part | target | baseline |\n|---|---|---|")
    for part in arguments.parts.split(","):
        shown = [
            (sum(markers.shown_by(answers[p.user]) for p in parts[part, side]), len(parts[part, side]))
            for side in ("target", "baseline")
        ]
        print(f"| {part} | {' | '.join(f'{hits}/{total}' for hits, total in shown)} |")
    if arguments.exceptions:
        for (part, side), some in parts.items():
            for prompt in some:
                if markers.shown_by(answers[prompt.user]) != (side == "target"):
                    print(f"{part} {side}: {prompt.user!r}\n    {answers[prompt.user]!r}")


def answered(prompts: list[Prompt], model: str, tokens: int, file: Path) -> dict[str, str]:
    """Answers by prompt: those in the file, and the others, generated and appended to it batch by batch."""
    answers: dict[str, str] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            answers[row["prompt"]] = row["answer"]
    missing = [prompt for prompt in prompts if prompt.user not in answers]
    if not missing:
        return answers
    engine = BatchEngine(load_model(ModelSettings(id=model)))
    for begin in range(0, len(missing), BATCH):
        batch = missing[begin : begin + BATCH]
        started = time.process_time()
        (responses,) = engine.generate(render(engine.tokenizer, batch, date=datetime.date.today()), [None], tokens)
        with file.open("a", encoding="utf-8") as stream:
            for prompt, response in zip(batch, responses):
                answers[prompt.user] = response.text
                stream.write(json.dumps({"prompt": prompt.user, "answer": response.text}, ensure_ascii=False) + "\n")
        print(f"{begin + len(batch)}/{len(missing)}: {time.process_time() - started:.1f} CPU s", flush=True)
    return answers


if __name__ == "__main__":
    main()
