"""What the tests of the serving engine share: tiny engines, eight edits, answers of baked models, collected events."""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.loading import LoadedModel
from serve.engine.engine import Event, GenerationRequest, ServingEngine
from serve.engine.types import joined
from serve.settings import EngineSettings
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, KERNEL, NARROW, make_bank

END = 258
HYBRIDS = ("llama", "gemma3_text", "qwen3_5_text")
EIGHT_EDITS = [
    *EDITS,
    Edit({"attention": KERNEL}, "a", 1.7, "none"),
    Edit({"attention": NARROW, "mlp": NARROW}, "b", 0.2, "full"),
    Edit({"attention": AblationParameters(0.7, 2.0, 1.0, 5.0)}, "b", None, "pre"),
    Edit({"mlp": AblationParameters(1.5, 0.0, 0.0, 1.5)}, "a", None, "full"),
]


def load(family: str = "llama", attention: str = "eager", **changes: object) -> LoadedModel:
    model = tiny_models.build(family, **changes)
    if attention != "eager":
        model.set_attn_implementation(attention)
    return loaded_from(model)


def loaded_from(model: nn.Module, lean_forward: bool = True) -> LoadedModel:
    return LoadedModel(
        model=model,
        tokenizer=tiny_models.build_tokenizer(),
        processor=None,
        architecture=find_architecture(model),
        dtype="float32",
        fingerprint="tiny",
        device=torch.device("cpu"),
        generation_config=GenerationConfig(eos_token_id=END),
        lean_forward=lean_forward,
    )


@contextmanager
def engine_of(loaded: LoadedModel, **settings: int) -> Iterator[ServingEngine]:
    """With the eight edits, as "0" to "7"."""
    engine = ServingEngine(loaded, EngineSettings(**settings))
    bank = bank_of(loaded)
    for k, edit in enumerate(EIGHT_EDITS):
        engine.add_edit(str(k), edit, bank)
    try:
        yield engine
    finally:
        engine.close()


def bank_of(loaded: LoadedModel) -> DirectionBank:
    return make_bank(loaded.architecture.n_layers, loaded.architecture.d_model)


def edited_copy(loaded: LoadedModel, edit: str | None) -> nn.Module:
    """A copy of the model without hooks, with the edit of this key in its weights."""
    model = copy.deepcopy(loaded.model)
    for module in model.modules():
        module._forward_hooks.clear()
    if edit is not None:
        bake(find_architecture(model), EIGHT_EDITS[int(edit)], bank_of(loaded))
    return model


@torch.inference_mode()
def greedy(model: nn.Module, prompt: Sequence[int], n_tokens: int, ignore_eos: bool = False) -> list[int]:
    """Token by token, the whole text anew each time, without a cache."""
    ids = list(prompt)
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == END and not ignore_eos:
            break
    return ids[len(prompt) :]


@torch.inference_mode()
def is_greedy(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether the model itself would have written these tokens: each is its choice after those before it."""
    logits_TV = model(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return logits_TV.argmax(-1).tolist() == list(tokens)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())


def request(ids: Sequence[int], edit: str | None = None, n_tokens: int = 12, **fields: object) -> GenerationRequest:
    return GenerationRequest(tuple(ids), edit, n_tokens, **{"temperature": 0.0, **fields})


async def collect(engine: ServingEngine, asked: GenerationRequest) -> Event:
    """All events of an answer as one."""
    events: list[Event] = []
    async for event in engine.generate(asked):
        assert not events or events[-1].finish_reason is None, "an event after the last one"
        events.append(event)
    return joined(events)


def run(work: Callable[[], Awaitable]) -> object:
    return asyncio.run(asyncio.wait_for(work(), timeout=120))


def answers(engine: ServingEngine, asked: Sequence[GenerationRequest]) -> list[Event]:
    async def work() -> list[Event]:
        return await asyncio.gather(*(collect(engine, one) for one in asked))

    return run(work)


def writer_in(loaded: LoadedModel, layer: int) -> nn.Module:
    """What attention ends with in this layer: called in every forward pass, the lean one as well."""
    return next(w.module for w in loaded.architecture.writers if (w.layer, w.component) == (layer, "attention"))


def together(engine: ServingEngine, asked: list[GenerationRequest]) -> list[Event]:
    """Answers that all begin in the same step: the engine's thread does not see them one by one."""

    async def work() -> list[Event]:
        with engine._changed:
            tasks = [asyncio.ensure_future(collect(engine, one)) for one in asked]
            # The lock is re-entrant, and the coroutines run in this thread.
            while engine._steps.n_rows < len(asked):
                await asyncio.sleep(0)
        return await asyncio.gather(*tasks)

    return run(work)


def check_texts(loaded: object, asked: list[GenerationRequest], found: list[Event]) -> None:
    for one, event in zip(asked, found):
        assert event.finish_reason in ("length", "stop"), event.error
        assert event.n_completion == one.max_tokens or event.token_ids[-1] == END
        assert is_greedy(edited_copy(loaded, one.edit), one.prompt_ids, event.token_ids)
