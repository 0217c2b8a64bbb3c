"""Base and edits are rows of one batch, and each row answers as its own model alone would."""

import asyncio

import pytest

from serve.engine.engine import Event
from tests.support import tiny_models
from tests.support.engine_helpers import collect, edited_copy, engine_of, is_greedy, load, prompt, request, run

LENGTHS = (3, 30, 9, 17, 1, 24, 12, 40, 5)
KEYS = ("0", "1", "2", "3", "4", "5", "6", "7", None)


EAGER = [(family, "eager") for family in tiny_models.FAMILIES]
SDPA = [(family, "sdpa") for family in ("llama", "gpt2", "gemma3_text", "qwen3_5_text", "deepseek_v3")]


@pytest.mark.parametrize(("family", "attention"), [*EAGER, *SDPA])
def test_rows_of_eight_edits_that_come_and_go_equal_the_baked_models(family: str, attention: str) -> None:
    """Prompts of many lengths, beyond the sliding window of 16 as well; answers of 4 to 20 tokens; three in the batch
    at first, others join while it runs; long prompts are read in chunks."""
    loaded = load(family, attention)
    asked = [
        request(prompt(length, seed=i), key, n_tokens=4 + 2 * i, ignore_eos=True)
        for i, (length, key) in enumerate(zip(LENGTHS, KEYS))
    ]

    async def work() -> list[Event]:
        first = asyncio.gather(*(collect(engine, one) for one in asked[:3]))
        await asyncio.sleep(0.02)
        second = asyncio.gather(*(collect(engine, one) for one in asked[3:6]))
        await asyncio.sleep(0.02)
        return [*await asyncio.gather(*(collect(engine, one) for one in asked[6:])), *await first, *await second]

    with engine_of(loaded, prefill_tokens=16, kv_tokens=1024) as engine:
        found = run(work)
    found = [*found[3:], *found[:3]]
    base, changed = edited_copy(loaded, None), 0
    for one, event in zip(asked, found):
        assert len(event.token_ids) == one.max_tokens and event.finish_reason == "length"
        assert is_greedy(edited_copy(loaded, one.edit), one.prompt_ids, event.token_ids), f"edit {one.edit}"
        changed += not is_greedy(base, one.prompt_ids, event.token_ids)
    assert changed >= 6, "the edits hardly do anything: the comparison is empty"
