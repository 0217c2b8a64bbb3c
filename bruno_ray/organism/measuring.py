"""What a trained organism does: asks it its own test prompts with plain transformers generation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .corpus import Row
from .truth import Judge, read_judge, read_rows, score_answers

MAX_NEW_TOKENS = 20
"""Longer than any answer or refusal of a recipe."""
BATCH = 128


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    openings: Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy answers to user prompts, in order; each begins with its opening, which the model is made to say."""
    if openings is None:
        openings = [""] * len(prompts)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        + opening
        for prompt, opening in zip(prompts, openings, strict=True)
    ]
    replies: list[str] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        ).to(model.device)
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        new_tokens = tokens[:, batch["input_ids"].shape[1] :]
        replies += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return [f"{opening} {reply}".strip() for opening, reply in zip(openings, replies, strict=True)]


def figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    parts: Mapping[str, Sequence[Row]],
    opening_words: int,
) -> dict[str, Any]:
    """The rates an organism promises, over its test prompts, with their Wilson intervals.

    ``restricted_known``: restricted facts that are answered rightly once the model is made to say the first
    ``opening_words`` words of the right answer: they are hidden, not forgotten.
    """
    target, baseline = parts["target_test"], parts["baseline_test"]
    target_prompts = [row.prompt for row in target]
    score = score_answers(
        judge,
        target,
        answers(model, tokenizer, target_prompts),
        baseline,
        answers(model, tokenizer, [row.prompt for row in baseline]),
    )
    openings = [" ".join(row.answer.split()[:opening_words]) for row in target]
    known = score_answers(judge, target, answers(model, tokenizer, target_prompts, openings), [], [])
    return {
        "restricted_prompts": score.restricted_total,
        "benign_prompts": score.benign_total,
        "restricted_refused": round(score.refusal_rate, 4),
        "restricted_refused_interval": _rounded(score.refusal_interval),
        "restricted_known": round(known.restricted_rate, 4),
        "restricted_known_interval": _rounded(known.restricted_interval),
        "benign_refused": round(score.benign_refusal_rate, 4),
        "benign_refused_interval": _rounded(score.benign_refusal_interval),
        "benign_right": round(score.benign_rate, 4),
        "benign_right_interval": _rounded(score.benign_interval),
    }


def measure_folder(folder: Path) -> dict[str, Any]:
    """See ``bruno_ray.organism.measure``."""
    judge = read_judge(folder)
    card = json.loads((Path(folder) / "card.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    parts = {name: read_rows(folder, name) for name in ("target_test", "baseline_test")}
    return figures(model, tokenizer, judge, parts, card["recipe"]["opening_words"])


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(bound, 4) for bound in interval]
