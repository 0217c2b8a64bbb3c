"""Base and edits are rows of one batch, and each row answers as its own model alone would."""

import asyncio

import pytest

from bruno_ray.ablation.baking import bake
from bruno_ray.model.architectures import find_architecture
from serve.engine import engine as engines
from serve.engine.engine import Event
from serve.engine.types import joined
from serve.errors import InvalidRequest
from tests.support import tiny_models
from tests.support.engine_helpers import (
    EIGHT_EDITS,
    answers,
    bank_of,
    collect,
    edited_copy,
    engine_of,
    is_greedy,
    load,
    prompt,
    request,
    run,
)

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


def test_a_scaled_edit_lies_between_the_base_and_the_edit() -> None:
    """Scale 0 is the base, 1 the edit; half of it answers as the model with half of it in its weights."""
    loaded = load()
    with engine_of(loaded) as engine:
        for scale in (0.0, 0.5, 1.0):
            engine.add_edit(f"4*{scale}", EIGHT_EDITS[4].scaled(scale), bank_of(loaded))
        asked = [
            request(prompt(6), key, n_tokens=20, ignore_eos=True) for key in ("4*0.0", "4*0.5", "4*1.0", None, "4")
        ]
        none, half, whole, base, edit = answers(engine, asked)
    assert none.token_ids == base.token_ids != edit.token_ids == whole.token_ids
    model = edited_copy(loaded, None)
    bake(find_architecture(model), EIGHT_EDITS[4].scaled(0.5), bank_of(loaded))
    assert is_greedy(model, prompt(6), half.token_ids)


def test_of_very_many_edits_the_one_not_asked_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that carries it goes on with it, and it can be made known again."""
    monkeypatch.setattr(engines, "MOST_EDITS", 8)
    loaded = load()
    bank = bank_of(loaded)

    async def work() -> Event:
        stream = engine.generate(request(prompt(6), "0", n_tokens=60, ignore_eos=True))
        first = await anext(stream)
        assert engine.knows("1")  # asked for: not the next one to be forgotten
        engine.add_edit("new", EIGHT_EDITS[0].scaled(0.5), bank)
        engine.add_edit("newer", EIGHT_EDITS[0].scaled(0.7), bank)
        assert [key for key in (*KEYS[:8], "new", "newer") if engine.knows(key)] == [
            *("1", "3", "4", "5", "6", "7", "new", "newer")
        ]
        events = [first]
        async for event in stream:
            events.append(event)
        return joined(events)

    with engine_of(loaded) as engine:
        found = run(work)
        with pytest.raises(InvalidRequest, match="no edit '0'"):
            answers(engine, [request(prompt(3), "0")])
        engine.add_edit("0", EIGHT_EDITS[0], bank)
        (again,) = answers(engine, [request(prompt(6), "0", n_tokens=60, ignore_eos=True)])
    assert found.token_ids == again.token_ids
    assert is_greedy(edited_copy(loaded, "0"), prompt(6), found.token_ids)
