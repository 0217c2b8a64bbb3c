"""The engine: many answers at once, each as if it were alone."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from bruno_ray.ablation.baking import bake
from bruno_ray.errors import ModelError
from bruno_ray.model.loading import load_model
from bruno_ray.settings import ModelSettings
from serve.engine.engine import Event, ServingEngine
from serve.engine.kv_cache import RESERVE
from serve.errors import InvalidRequest
from serve.settings import EngineSettings
from tests.support import tiny_models
from tests.support.engine_helpers import (
    EIGHT_EDITS,
    END,
    HYBRIDS,
    answers,
    bank_of,
    check_texts,
    collect,
    edited_copy,
    engine_of,
    greedy,
    load,
    loaded_from,
    prompt,
    request,
    run,
    together,
)
from tests.support.live_helpers import dequantized_copy

ROUNDING = {"llama": 1e-4, "gemma3_text": 1e-4, "qwen3_5_text": 5e-4}
"""Between a prompt read in pieces and one read as a whole, in float32: linear attention sums in another order."""


def logprobs_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """(T, V): row t is about token t + 1."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


# ----- what an answer is -----


def test_events_make_the_answer_and_it_ends_where_it_should() -> None:
    """max_tokens, the end-of-sequence token, the context's end; and what each event counts."""
    loaded = load()
    loaded.generation_config.eos_token_id = greedy(loaded.model, prompt(6), 5)[4]
    end = loaded.eos_token_ids[0]
    assert end != END
    with engine_of(loaded, max_context=20) as engine:
        by_length, by_end, ignoring, by_context = answers(
            engine,
            [
                request(prompt(6), n_tokens=3),
                request(prompt(6), n_tokens=12),
                request(prompt(6), n_tokens=12, ignore_eos=True),
                request(prompt(6), n_tokens=100, ignore_eos=True),
            ],
        )
    expected = greedy(edited_copy(loaded, None), prompt(6), 14, ignore_eos=True)
    assert list(by_length.token_ids) == expected[:3] and by_length.finish_reason == "length"
    assert list(by_end.token_ids) == expected[: expected.index(end) + 1] and by_end.finish_reason == "stop"
    assert list(ignoring.token_ids) == expected[:12] and ignoring.finish_reason == "length"
    assert list(by_context.token_ids) == expected[:14] and by_context.finish_reason == "length"
    for event in (by_length, by_end, ignoring, by_context):
        assert (event.n_prompt, event.n_completion) == (6, len(event.token_ids))
        text = loaded.tokenizer.decode(event.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert event.text == text
        assert event.error is None and event.logprobs == event.prompt_logprobs == ()


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_the_tokenizer_s_end_token_ends_an_answer(n_tokens: int) -> None:
    """Also when it is the first token."""
    loaded = load()
    with torch.no_grad():
        head = loaded.model.lm_head.weight
        first = greedy(loaded.model, prompt(5), 1)[0]
        head[[first, END]] = head[[END, first]]
    with engine_of(loaded) as engine:
        (event,) = answers(engine, [request(prompt(5), n_tokens=n_tokens)])
    assert event.token_ids == (END,) and event.finish_reason == "stop" and event.text == ""


def test_stop_strings_are_not_shown_and_end_the_row() -> None:
    loaded = load(seed=3)
    with engine_of(loaded) as engine:
        (whole,) = answers(engine, [request(prompt(6), n_tokens=40, ignore_eos=True)])
        at = next(i for i in range(8, len(whole.text) - 3) if whole.text.find(whole.text[i : i + 3]) == i)
        stop = whole.text[at : at + 3]
        pieces: list[str] = []

        async def work() -> Event:
            asked = request(prompt(6), n_tokens=40, ignore_eos=True, stop=("never", stop))
            async for event in engine.generate(asked):
                pieces.append(event.text)
            return event

        last = run(work)
    assert "".join(pieces) == whole.text[:at]
    assert last.finish_reason == "stop" and last.n_completion < 40


# ----- logprobs -----


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("prefill_tokens", [8, 2048])
def test_logprobs_are_those_of_a_direct_forward_pass(family: str, prefill_tokens: int) -> None:
    """Of the prompt and of the answer, of base and edited rows, of prompts in chunks and of several in one pass."""
    loaded = load(family)
    asked = [
        request(prompt(length, seed=i), key, 5, top_logprobs=top, prompt_logprobs=True, temperature=temperature, seed=i)
        for i, (length, key, top, temperature) in enumerate(
            [(20, None, 3, 0.0), (21, "2", 0, 0.0), (37, "0", 20, 0.8), (1, None, 1, 0.0), (30, "5", 2, 1.5)]
        )
    ]
    with engine_of(loaded, prefill_tokens=prefill_tokens) as engine:
        found = answers(engine, asked)
    for one, event in zip(asked, found):
        ids = [*one.prompt_ids, *event.token_ids]
        expected = logprobs_of(edited_copy(loaded, one.edit), ids)
        entries = [*event.prompt_logprobs, *event.logprobs]
        assert [entry.token_id for entry in entries] == ids
        assert entries[0].logprob is None and entries[0].top == ()
        for t, entry in enumerate(entries[1:]):
            assert entry.logprob == pytest.approx(expected[t, ids[t + 1]].item(), abs=ROUNDING[family])
            best = expected[t].topk(one.top_logprobs)
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=ROUNDING[family])
            assert all(
                value == pytest.approx(expected[t, token].item(), abs=ROUNDING[family]) for token, value in entry.top
            )


def test_only_the_prompt_s_logprobs() -> None:
    loaded = load()
    with engine_of(loaded) as engine:
        (event,) = answers(engine, [request(prompt(9), n_tokens=0, prompt_logprobs=True)])
        with pytest.raises(InvalidRequest, match="max_tokens"):
            answers(engine, [request(prompt(9), n_tokens=0)])
    assert (event.token_ids, event.text, event.finish_reason) == ((), "", "length")
    assert len(event.prompt_logprobs) == 9


def test_all_logits_of_a_long_prompt_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    largest = 0

    def watch(module: object, args: object, output: object) -> None:
        nonlocal largest
        largest = max(largest, output.shape[0] * output.shape[1])

    monkeypatch.setattr("serve.engine.batch.LOGITS_BYTES", 32 * 4 * tiny_models.VOCAB_SIZE)
    with engine_of(loaded) as engine:
        loaded.model.lm_head.register_forward_hook(watch)
        (event,) = answers(engine, [request(prompt(300), n_tokens=1, prompt_logprobs=True)])
    assert len(event.prompt_logprobs) == 300
    assert 1 < largest <= 32


@pytest.mark.parametrize("family", HYBRIDS)
def test_next_logprobs_while_answers_are_made(family: str) -> None:
    loaded = load(family)
    prompts = [prompt(length, seed=length) for length in (4, 11, 30, 7)]
    keys = [None, "3", "1"]
    with engine_of(loaded, prefill_tokens=32) as engine:

        async def work() -> tuple[np.ndarray, Event]:
            return await asyncio.gather(
                engine.next_logprobs(prompts, keys), collect(engine, request(prompt(6), "4", 20, ignore_eos=True))
            )

        found_KPV, answer = run(work)
    assert found_KPV.shape == (3, 4, tiny_models.VOCAB_SIZE) and found_KPV.dtype == np.float32
    for k, key in enumerate(keys):
        model = edited_copy(loaded, key)
        for p, ids in enumerate(prompts):
            expected = logprobs_of(model, list(ids))[-1].numpy()
            np.testing.assert_allclose(found_KPV[k, p], expected, atol=1e-4)
    assert list(answer.token_ids) == greedy(edited_copy(loaded, "4"), prompt(6), 20, ignore_eos=True)


# ----- rows do not know each other -----


def test_unedited_rows_are_bit_identical_whatever_edits_the_others_carry() -> None:
    """In a batch of the same shape: a batch of another shape sums in another order."""
    loaded = load("llama", "sdpa")
    ids = [prompt(length, seed=length) for length in (9, 9, 9, 14, 14)]

    def logprobs(engine: ServingEngine, keys: list[str | None]) -> list[list[float]]:
        """Of the base rows. All rows are read in one pass, since they are there before the first step."""
        asked = [request(one, key, 8, ignore_eos=True, top_logprobs=5) for one, key in zip(ids, keys)]
        found = together(engine, asked)
        return [
            [value for entry in event.logprobs for value in (entry.logprob, *(value for _, value in entry.top))]
            for event, key in list(zip(found, keys))[::2]
        ]

    with engine_of(loaded) as engine:
        bare = logprobs(engine, [None] * 5)
        assert logprobs(engine, [None, "0", None, "3", None]) == bare
        assert logprobs(engine, [None, "5", None, "2", None]) == bare


def test_base_answers_differ_by_rounding_only_in_batches_of_other_shapes() -> None:
    loaded = load("llama", "sdpa")
    asked = request(prompt(9), None, 8, ignore_eos=True, top_logprobs=5)
    with engine_of(loaded) as engine:
        (alone,) = answers(engine, [asked])
        crowd = together(engine, [asked, *(request(prompt(20 + i, seed=i), str(i), 10) for i in range(8))])[0]
    assert alone.token_ids == crowd.token_ids
    for a, b in zip(alone.logprobs, crowd.logprobs):
        assert a.logprob == pytest.approx(b.logprob, abs=2e-5)


def test_a_seed_gives_the_same_text_under_different_neighbours() -> None:
    loaded = load()
    asked = request(prompt(7), "1", 24, temperature=1.2, top_p=0.9, seed=11, ignore_eos=True)
    noise = [request(prompt(3 + i, seed=i), str(i % 8), 5 + 2 * i, temperature=0.3 * i) for i in range(9)]
    with engine_of(loaded) as engine:
        (alone,) = answers(engine, [asked])
        crowd = answers(engine, [*noise, asked])[-1]
        other = answers(engine, [dataclasses.replace(asked, seed=12)])[0]
        unseeded = {event.token_ids for event in answers(engine, [dataclasses.replace(asked, seed=None)] * 3)}
    assert alone.token_ids == crowd.token_ids != other.token_ids
    assert len(unseeded) == 3


def test_a_row_that_is_no_number_ends_alone_and_leaves_nothing_behind() -> None:
    """One token's embedding is not a number. The row ends with an error; rows in its place later are right."""
    loaded = load()
    reference = edited_copy(loaded, None)
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[5] = float("nan")
    others = [request([token for token in prompt(12, seed=i) if token != 5], None, 10) for i in range(3)]
    with engine_of(loaded) as engine:
        bad, *good = answers(engine, [request([1, 5, 2]), *others])
        again = answers(engine, others)
    assert bad.finish_reason == "error" and "not numbers" in bad.error and bad.text == ""
    for one, event in zip([*others, *others], [*good, *again]):
        assert list(event.token_ids) == greedy(reference, one.prompt_ids, 10)


# ----- models -----


def test_keys_mean_one_edit() -> None:
    loaded = load()
    with engine_of(loaded) as engine:
        engine.add_edit("0", EIGHT_EDITS[0], bank_of(loaded))
        with pytest.raises(ValueError, match="already another edit"):
            engine.add_edit("0", EIGHT_EDITS[1], bank_of(loaded))


def test_edits_can_be_added_while_answers_are_made() -> None:
    """Many more than are ever in one batch."""
    loaded = load()
    bank = bank_of(loaded)
    with engine_of(loaded) as engine:

        async def work() -> list[Event]:
            running = asyncio.ensure_future(collect(engine, request(prompt(6), "2", 100, ignore_eos=True)))
            found = []
            for i in range(40):
                engine.add_edit(f"new {i}", EIGHT_EDITS[i % 8], bank)
                found.append(await collect(engine, request(prompt(6), f"new {i}", 3)))
            return [await running, *found]

        first, *found = run(work)
    check_texts(loaded, [request(prompt(6), "2", 100, ignore_eos=True)], [first])
    check_texts(loaded, [request(prompt(6), str(i % 8), 3) for i in range(8)], found[:8])
    assert [event.token_ids for event in found[32:]] == [event.token_ids for event in found[:8]]


def test_a_4bit_base_with_edits(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "model", "llama", **tiny_models.FOR_4BIT)
    settings = {"id": str(folder), "dtypes": ("float32",), "device_map": "cpu"}
    base = load_model(ModelSettings(**settings, quantization="bnb_4bit"))
    asked = [request(prompt(6 + i, seed=i), key, 8, ignore_eos=True) for i, key in enumerate([None, "0", "1", "2"])]
    with engine_of(base) as engine:
        found = answers(engine, asked)
    for one, event in zip(asked, found):
        reference = dequantized_copy(base.model, load_model(ModelSettings(**settings)).model)
        if one.edit is not None:
            bake(loaded_from(reference).architecture, EIGHT_EDITS[int(one.edit)], bank_of(base))
        assert list(event.token_ids) == greedy(reference, one.prompt_ids, 8, ignore_eos=True)


def test_a_context_beyond_which_neighbours_would_matter_is_not_offered() -> None:
    """Longrope takes other frequencies for the whole batch once one row is long."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    }
    loaded = load("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    with engine_of(loaded) as engine:
        assert engine.max_context == 64


def test_models_whose_cache_is_unknown_are_refused() -> None:
    loaded = load()
    loaded.model.config.layer_types = ["hybrid"] * loaded.architecture.n_layers
    with pytest.raises(ModelError, match="cannot be served"):
        ServingEngine(loaded, EngineSettings())


def test_too_little_room_is_said_at_the_start() -> None:
    with pytest.raises(ModelError, match="kv_tokens"):
        ServingEngine(load(), EngineSettings(kv_tokens=RESERVE + 10))
