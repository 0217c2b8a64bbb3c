"""The engine on a GPU, with random models of real shapes that are made on the device: nothing is downloaded.

    python -m benchmarks.gpu_engine [--shapes 1B 4B 8B] [--seconds 450] [--to FILE.json] [--write]

It needs torch, transformers and this package only, prints as it goes, and writes its figures after every shape, so
that a run that is cut off has given what it had; by itself it ends within eight minutes, whatever comes. Per shape:
trials per hour for 1, 2, 4 ... trials at once and their share of the limit, phases, decoding with and without edits,
peak memory (`bruno_ray.pipeline.benching` says how), and the same trial the usual way: transformers' `generate` for
one edit at a time, without hooks, and one pass for the KL. Trained trials per minute are from a few steps of trainings
side by side, on random texts of the default settings' number and length, without rivals and without looking at the
edits' own answers in between. On a CPU it takes the shape `tiny`.
"""

import argparse
import faulthandler
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.results import write_section
from bruno_ray.ablation.plan import TrainingPlan
from bruno_ray.errors import ModelError
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning.material import Material, Text
from bruno_ray.learning.training import Trainer
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import LoadedModel
from bruno_ray.pipeline.benching import Load, bench, timed
from bruno_ray.settings import LearnedSettings
from bruno_ray.study.trainings import versions

MOST_SECONDS = 450.0
GRACE = 20.0
"""Seconds after which a program that does not stop by itself, in a kernel for example, is ended."""

TRAINING_STEPS = 3
TRAININGS = (1, 4)
"""At once."""

SHAPES = {  # layers, width, MLP width, heads, key-value heads, vocabulary, head tied to the embedding
    "tiny": (2, 32, 64, 4, 2, 128, True),
    "1B": (16, 2048, 8192, 32, 8, 128256, True),
    "4B": (36, 2560, 9728, 32, 8, 151936, True),
    "8B": (32, 4096, 14336, 32, 8, 128256, False),
}
"""1B and 8B as Llama 3, 4B as Qwen 3, all built as llama."""


def random_model(shape: str, device: torch.device) -> LoadedModel:
    """In bfloat16 on a GPU, float32 elsewhere; weights as transformers draws them."""
    layers, width, mlp, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    words = {"<pad>": 0, "<end>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        processor=None,
        architecture=find_architecture(model),
        dtype=str(dtype).removeprefix("torch."),
        fingerprint=f"random {shape}",
        device=device,
        generation_config=GenerationConfig(eos_token_id=1),
    )


@torch.inference_mode()
def usual_seconds(loaded: LoadedModel, load: Load) -> float:
    """One trial by `generate`: all target prompts in one batch, and the next token of all baseline prompts."""
    generator = torch.Generator().manual_seed(1)
    ids_PT = torch.randint(2, loaded.model.config.vocab_size, (load.prompts, load.prompt_tokens), generator=generator)
    ids_PT = ids_PT.to(loaded.device)
    mask_PT = torch.ones_like(ids_PT)

    def trial() -> None:
        loaded.model.generate(
            input_ids=ids_PT,
            attention_mask=mask_PT,
            do_sample=False,
            min_new_tokens=load.response_tokens,
            max_new_tokens=load.response_tokens,
            pad_token_id=0,
        )
        loaded.model(input_ids=ids_PT, attention_mask=mask_PT, logits_to_keep=1)

    trial()
    return timed(trial, loaded.device)


def trained_rows(loaded: LoadedModel, load: Load) -> list[dict[str, Any]]:
    """Trained trials per minute for some trainings at once; fewer rows where memory does not suffice."""
    engine, settings = BatchEngine(loaded), LearnedSettings(renew_every=0)
    generator = torch.Generator().manual_seed(2)

    def texts(n: int, n_tokens: int, **more: Any) -> list[Text]:
        size = (min(n, load.prompts), load.prompt_tokens + n_tokens)
        ids = torch.randint(2, engine.vocabulary_size, size, generator=generator).tolist()
        return [Text(tuple(row[: load.prompt_tokens]), tuple(row[load.prompt_tokens :]), **more) for row in ids]

    suppress = texts(settings.target_prompts, load.response_tokens, weights=(1.0,) * load.response_tokens)
    retain = texts(settings.baseline_prompts, settings.retain_tokens)
    read = engine.last_logits(
        [(*text.prompt, *text.continuation) for text in retain], [None], settings.retain_tokens + 1
    )
    for _, row_B, logits_BNV in read:
        for row, logits_NV in zip(row_B.tolist(), logits_BNV):
            retain[row] = replace(retain[row], unedited_NV=logits_NV[:-1].clone())
    layers, width = loaded.architecture.n_layers, loaded.architecture.d_model
    directions = torch.nn.functional.normalize(torch.randn(layers + 1, 1, width, generator=generator), dim=-1)
    teacher: Any = SimpleNamespace(material=Material(suppress=suppress, retain=retain), asked=(), few_shot=())
    trainer = Trainer(engine, teacher, {"random": directions}, settings)
    rows: list[dict[str, Any]] = []
    for n in TRAININGS:
        plans = [
            TrainingPlan(1, True, "random", layers / 2, 0, 0.0, 1.0, 3.0, settings.learning_rate, TRAINING_STEPS, seed)
            for seed in range(n)
        ]
        try:
            trainer.train([replace(plan, steps=1) for plan in plans])
            step = timed(partial(trainer.train, plans), engine.device) / TRAINING_STEPS
        except ModelError:
            break
        trials, seconds = versions(settings) * n, step * settings.steps
        rows.append({"trainings": n, "seconds": seconds, "trials_per_minute": 60 * trials / seconds})
    engine.editor.close()
    return rows


class OutOfTimeError(Exception):
    """The time that the program has is over."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the main thread then, and end the program a little later if that does not help."""

    def over(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def measure(shape: str, device: torch.device, load: Load) -> dict[str, Any]:
    """What `bench` gives of one shape, with the usual way beside it."""
    loaded = random_model(shape, device)
    usual = usual_seconds(loaded, load)
    print(f"{shape}: {usual:.4g} s a trial by transformers' generate, one at a time", flush=True)
    result = bench(loaded, load, lambda line: print(f"{shape}: {line}", flush=True))
    trained = trained_rows(loaded, load)
    for row in trained:
        print(
            f"{shape}: {row['trainings']} trainings at once: {row['trials_per_minute']:.3g} trained trials/min",
            flush=True,
        )
    return result | {"shape": shape, "usual_seconds": usual, "trained": trained}


def table(results: list[dict[str, Any]]) -> str:
    """One row per shape and number of trials at once."""
    lines = [
        "| shape | at once | s per trial | trials/h | tokens/s | share of the limit | times the usual way |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            each = row["seconds"] / row["trials"]
            lines.append(
                f"| {result['shape']} | {row['trials']} | {each:.4g} | {row['trials_per_hour']:.0f} |"
                f" {row['tokens_per_second']:.0f} | {row['share_of_limit']:.1%} |"
                f" {result['usual_seconds'] / each:.2f} |"
            )
        parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in result["phases"]["seconds"].items())
        memory = result["memory"]
        lines.append(
            f"| {result['shape']} | {result['phases']['trials']} | {parts}; {memory['peak_bytes'] / 2**30:.3g} GiB"
            " | | | | |"
        )
        trained = ", ".join(
            f"{row['trials_per_minute']:.3g} trained trials/min with {row['trainings']} trainings at once"
            for row in result["trained"]
        )
        lines.append(f"| {result['shape']} | | {trained or 'no training fits into memory'} | | | | |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1B", "4B", "8B"] if gpu else ["tiny"])
    parser.add_argument(
        "--seconds", type=float, default=MOST_SECONDS, help="in all, at most; each shape gets an equal part of the rest"
    )
    parser.add_argument("--prompts", type=int, default=100 if gpu else 4)
    parser.add_argument("--at-once", type=int, default=32 if gpu else 4)
    parser.add_argument("--to", type=Path, help="figures as JSON")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args(argv)
    device, began = torch.device("cuda" if gpu else "cpu"), time.perf_counter()
    results: list[dict[str, Any]] = []
    try:
        with bounded(min(arguments.seconds, MOST_SECONDS)):
            for i, shape in enumerate(arguments.shapes):
                left = arguments.seconds - (time.perf_counter() - began)
                load = Load(
                    arguments.prompts, most_trials=arguments.at_once, seconds=0.6 * left / (len(arguments.shapes) - i)
                )
                results.append(measure(shape, device, load))
                if gpu:
                    torch.cuda.empty_cache()
                if arguments.to is not None:
                    arguments.to.write_text(json.dumps(results, indent=1))
    except OutOfTimeError:
        print(
            f"the time is over after {', '.join(result['shape'] for result in results) or 'no whole shape'}", flush=True
        )
    print(table(results), flush=True)
    if arguments.write:
        write_section(
            "gpu_engine",
            f"## Random models of real shapes (`python -m benchmarks.gpu_engine`)\n\n{arguments.prompts} + "
            f"{arguments.prompts} prompts of 40 tokens, answers of 30, KL over 16; none ends early, none is"
            " drafted.\n\n" + table(results),
        )


if __name__ == "__main__":
    main()
