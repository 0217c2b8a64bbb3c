"""What a trial of SmolLM2 costs in processor time, beside heretic 1.4.0's on the same prompts, and where it goes.

    python benchmarks/trial_cost.py [--trials 16] [--prompts 40] [--as-heretic] [--write]

A study of the preset `disclaimers` in this process: the product's sampler, schedule and worker, one thread, trials one
after the other as the product runs them on a CPU. heretic's figure is of its own command on the same prompts and number
of tokens (``tool_runs.py``), from the cache of `benchmarks/real_model.py` where it has run. Ours measures more by
default: the KL over 16 positions instead of one, and three further scorers. ``--as-heretic`` measures what heretic
does.

The floor is what the multiplications with the model's weights take at the rate of a large matrix product, without
padding: every token that is read or made, and the output head where logits are needed. Beside it the same with the
padding that was computed.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from in_process import Lab
from real_model import BEHAVIOUR, HERETICS, SYSTEM
from results import write_section

from bruno_ray.files import cache_folder
from bruno_ray.model.named_models import named_folder
from bruno_ray.pipeline.benching import measure_limits, sizes_of

DTYPE, TOKENS = "bfloat16", 30


class Meter:
    """Processor seconds by phase, and what was multiplied."""

    def __init__(self, lab: Lab):
        self.seconds: Counter[str] = Counter()
        self.body_tokens = self.head_tokens = 0
        """With padding."""

        engine = lab.worker.engine
        self._measure(engine, "generate", "answers")
        self._measure(engine, "token_logprobs", "likelihoods (elicited_answers)")
        self._measure(engine.editor, "resolve_all", "working edits out")
        for scorer in lab.worker.prepared(lab.context).scorers:
            if scorer.name == "kl_divergence":
                self._measure(scorer, "score", "KL divergence")
        forward = engine._forward

        def counted(ids_BJ, mask_BC, positions_BJ, cache, keep):
            self.body_tokens += ids_BJ.numel()
            self.head_tokens += ids_BJ.shape[0] * min(keep, ids_BJ.shape[1])
            return forward(ids_BJ, mask_BC, positions_BJ, cache, keep)

        engine._forward = counted

    def _measure(self, owner: Any, method: str, phase: str) -> None:
        plain: Callable = getattr(owner, method)

        def measured(*arguments: Any, **options: Any) -> Any:
            with self.during(phase):
                return plain(*arguments, **options)

        setattr(owner, method, measured)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.seconds[phase] += time.thread_time() - start


def lab_of(arguments: argparse.Namespace) -> Lab:
    n = arguments.prompts
    scoring: dict[str, Any] = {"response_tokens": TOKENS}
    if arguments.as_heretic:
        scoring |= HERETICS
    return Lab(
        behaviour=BEHAVIOUR,
        model={"id": str(named_folder("smollm2")), "dtypes": (arguments.dtype,)},
        prompts={"system_prompt": SYSTEM, "n_train": n, "n_validation": n, "n_test": n},
        scoring=scoring,
    )


def heretics(lab: Lab) -> dict[str, Any] | None:
    """heretic's cached figures on the same validation prompts, if it has run here."""
    for folder in cache_folder("heretic-1.4.0-runs").glob("*"):
        if not (folder / "result.json").exists() or f'"{DTYPE}"' not in (folder / "config.toml").read_text():
            continue
        sides = {"target": lab.prompts.target.validation, "baseline": lab.prompts.baseline.validation}
        lines = {side: (folder / f"{side}_validation.txt").read_text().splitlines() for side in sides}
        if all(lines[side] == [prompt.user for prompt in prompts] for side, prompts in sides.items()):
            return json.loads((folder / "result.json").read_text())
    return None


def section(arguments: argparse.Namespace, rows: list[str], notes: list[str]) -> str:
    measured = "the default scorers"
    if arguments.as_heretic:
        measured = "measured is what heretic measures, markers and the KL at the first token"
    return "\n".join(
        [
            "## A trial of SmolLM2 (`python benchmarks/trial_cost.py`)",
            "",
            f"{arguments.prompts} + {arguments.prompts} validation prompts of `{BEHAVIOUR}`, answers of {TOKENS}"
            f" tokens, {arguments.dtype}, one thread, {arguments.trials} trials of a study, one at a time; {measured}."
            " Processor seconds.",
            "",
            *rows,
            "",
            *notes,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=DTYPE)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--as-heretic", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the section into RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lab = lab_of(arguments)
    engine = lab.worker.engine
    limits, sizes = measure_limits(engine.device, engine.model.dtype), sizes_of(engine.loaded)
    meter = Meter(lab)
    tokens, start = engine.tokens, time.thread_time()
    done = lab.search(
        arguments.seed,
        arguments.trials,
        n_startup_trials=min(8, arguments.trials),
        trials_per_batch=arguments.at_once,
    )
    seconds, tokens = time.thread_time() - start, engine.tokens - tokens
    n = arguments.trials
    useful = 2 * (tokens * sizes.body + meter.head_tokens * sizes.head)
    padded = 2 * (meter.body_tokens * sizes.body + meter.head_tokens * sizes.head)
    shown = statistics.mean(trial.counts["behaviour_rate"][0] for trial in done.trials)
    rows = ["| | s a trial |", "|---|---|", f"| **a trial** | **{seconds / n:.2f}** |"]
    rows += [f"| {phase} | {spent / n:.2f} |" for phase, spent in meter.seconds.most_common()]
    rows += [
        f"| sampling, reading answers, the rest | {(seconds - sum(meter.seconds.values())) / n:.2f} |",
        f"| floor: {tokens / n:.0f} tokens, {useful / n / 1e12:.2f} Tflop at {limits.matmul_flops / 1e9:.0f} Gflop/s |"
        f" {useful / n / limits.matmul_flops:.2f} |",
        f"| the same with padding: {meter.body_tokens / n:.0f} tokens | {padded / n / limits.matmul_flops:.2f} |",
    ]
    theirs = heretics(lab)
    notes = [f"On average {shown:.1f} of {arguments.prompts} answers are marked."]
    if theirs is not None:
        marked = statistics.mean(trial["shown"] for trial in theirs["trials"])
        notes.append(
            f"heretic 1.4.0 takes {theirs['trial_cpu']:.1f} s ({marked:.1f} marked, {len(theirs['trials'])} trials,"
            f" measured apart): {theirs['trial_cpu'] * n / seconds:.1f} times as much."
        )
    text = section(arguments, rows, [" ".join(notes)])
    print(text, flush=True)
    if arguments.write:
        write_section("trial_cost_as_heretic" if arguments.as_heretic else "trial_cost", text)


if __name__ == "__main__":
    main()
