"""Reasoning left open: prompts after which a model reasons before it answers, and where an answer's reasoning ends.

A run closes the reasoning block of every answer (``response_prefix.py``), so what it measures is the model with its
reasoning switched off. People use such a model with its reasoning on, and an edit may do something else there.
"""

import datetime
from collections.abc import Sequence
from typing import Any

from bruno_ray.prompts.rendering import PROBE, render_texts
from bruno_ray.prompts.response_prefix import closer_of, open_block, opener_of
from bruno_ray.prompts.sets import Prompt

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates switch reasoning: Qwen3, GLM, SmolLM3 and others the first, DeepSeek V3.1, Granite
and others the second. A template passes over what it does not know."""


def open_texts(
    tokenizer: Any, prompts: Sequence[Prompt], response_prefix: str, date: datetime.date
) -> list[str] | None:
    """The prompts with reasoning open; None for a model that has no reasoning to open.

    It has if its chat template renders differently with its switch on and off, if the template opens a block itself, or
    if the run had to close one that answers began with (``response_prefix``).
    """
    probe = [Prompt(PROBE)]
    on, off = (
        render_texts(tokenizer, probe, date=date, switches=dict.fromkeys(SWITCHES, value))[0] for value in (True, False)
    )
    if on == off and open_block(on) is None and opener_of(response_prefix.lstrip()) is None:
        return None
    return render_texts(tokenizer, prompts, date=date, switches=dict.fromkeys(SWITCHES, True))


def final_answer(prompt: str, answer: str) -> str | None:
    """What follows the reasoning block; None if the block is never closed, all of it if the answer has none.

    Args:
        prompt: as the model reads it; its template may have opened the block.
        answer: with special tokens, which openers and closers may be.
    """
    opener = open_block(prompt) or opener_of(answer.lstrip())
    if opener is None:
        return answer
    _, closer, rest = answer.partition(closer_of(opener))
    return rest if closer else None
