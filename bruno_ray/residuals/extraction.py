"""The residual stream at the last prompt token, and at the first tokens of the model's own answer, or of one that is
made to begin in a given way.

Hooks keep one position of each block's output and let the rest go, so that a batch costs O(layers x rows x d_model)
beside the forward pass itself; `output_hidden_states` would keep all positions of all layers. Without answer tokens
the language-model head is not run at all, and what all prompts begin with (a system message) is read once.

Stream point 0 is what the first block receives (embeddings with whatever scale, norm or positions the model adds);
point l + 1 is the output of block l, before the final norm (`hidden_states[-1]` is after it).

Shapes: N prompts, B rows of a batch, P = 1 + answer_tokens positions, L = n_layers + 1 stream points, D = d_model.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bruno_ray.errors import ModelError
from bruno_ray.model.batching import PaddedBatch, TokenBudget, map_batches, pad_left
from bruno_ray.model.loading import LoadedModel

CPU_TOKENS = 1024
"""Tokens of one forward pass on a CPU. Of 256 to 8192, this took the least processor time per token for llamas of
d_model 96 and 256: products with fewer rows are slower, and larger activations fall out of the cache."""

SHARED_TOKENS = 64
"""A common beginning is read apart if that spares so many tokens."""

OnBatch = Callable[[int, int], None]


def extract_residuals(
    loaded: LoadedModel,
    ids: Sequence[Sequence[int]],
    answer_tokens: int = 0,
    batch_tokens: int | TokenBudget = 0,
    on_batch: OnBatch | None = None,
    opening: Sequence[int] = (),
) -> Float[Tensor, "prompt position point d_model"]:
    """Residuals of every prompt, (N, P, L, D) float32 on the CPU.

    Position 0 is the last prompt token; position i is the i-th token of the greedy answer, read when that token is
    the input. Where the answer has ended before, the position repeats the last one that was read: an end-of-sequence
    token says nothing about the behaviour, and a row of zeros would pull the means.

    Args:
        ids: Token ids of each prompt, with the assistant header.
        batch_tokens: Tokens of one forward pass, padding included; 0 finds it. A `TokenBudget` keeps what was found
            for the next call.
        on_batch: Called with (prompts done, prompts in total).
        opening: Tokens that every answer is made to begin with; it goes on greedily.

    Raises:
        ModelError: a residual is not finite, or one prompt alone does not fit into memory.
    """
    budget = batch_tokens
    if not isinstance(budget, TokenBudget):
        budget = TokenBudget.for_device(loaded.device, budget, CPU_TOKENS)
    n_points, d_model = loaded.architecture.n_layers + 1, loaded.architecture.d_model
    residuals_NPLD = torch.empty(len(ids), 1 + answer_tokens, n_points, d_model)

    beginning = _read_beginning(loaded, ids) if ids and not answer_tokens else None

    def forward(rows: list[int]) -> Float[Tensor, "row position point d_model"]:
        given = [ids[row] for row in rows]
        if beginning is not None:
            return _read_rest(loaded, beginning, given)
        batch = pad_left(given, loaded.tokenizer.pad_token_id or 0, loaded.device)
        return _read_answer(loaded, batch, answer_tokens, opening) if answer_tokens else _read_prompt(loaded, batch)

    done = 0
    for rows, batch_BPLD in map_batches(forward, [len(prompt) + answer_tokens for prompt in ids], budget):
        _check_finite(batch_BPLD, rows)
        residuals_NPLD[rows] = batch_BPLD
        done += len(rows)
        if on_batch is not None:
            on_batch(done, len(ids))
    return residuals_NPLD


class LastPosition:
    """What the hooks have kept of the latest forward pass."""

    def __init__(self, n_points: int) -> None:
        self.kept_L: list[Float[Tensor, "row d_model"] | None] = [None] * n_points

    def keep(self, point: int, hidden_BTD: Float[Tensor, "*stream row position d_model"]) -> None:
        if hidden_BTD.ndim == 4:  # several streams at once (gemma3n): the first is the one that layers compute with
            hidden_BTD = hidden_BTD[0]
        # A copy, not a slice: a slice would keep the storage of all positions alive.
        self.kept_L[point] = hidden_BTD[:, -1].to(torch.float32, copy=True)

    def take(self) -> Float[Tensor, "row point d_model"]:
        """Everything kept, on the CPU; layers may lie on different devices."""
        if any(kept is None for kept in self.kept_L):
            point = self.kept_L.index(None)
            raise ModelError(
                f"block {max(point - 1, 0)} did not run in a forward pass: this model skips blocks, use another"
            )
        stacked_BLD = torch.stack([kept_BD.cpu() for kept_BD in self.kept_L], dim=1)
        self.kept_L = [None] * len(self.kept_L)
        return stacked_BLD


@contextmanager
def last_position(layers: Sequence[nn.Module]) -> Iterator[LastPosition]:
    """Record the last position of every stream point of the forward passes inside the `with` block."""
    record = LastPosition(len(layers) + 1)

    def before_first(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        record.keep(0, args[0] if args else kwargs["hidden_states"])

    def after(point: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
            record.keep(point, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [layer.register_forward_hook(after(index + 1)) for index, layer in enumerate(layers)]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _read_prompt(loaded: LoadedModel, batch: PaddedBatch) -> Float[Tensor, "row 1 point d_model"]:
    body = loaded.model.base_model  # without the language-model head
    with last_position(loaded.architecture.layers) as record:
        body(**_inputs(body, batch.input_ids, batch.attention_mask, batch.position_ids), use_cache=False)
    return record.take()[:, None]


@torch.inference_mode()
def _read_beginning(loaded: LoadedModel, ids: Sequence[Sequence[int]]) -> DynamicCache | None:
    """Keys and values of what all prompts begin with; None where that is too short, or could not be hidden from.

    Padding comes to lie behind it. A mask hides that in plain attention; a sliding window counts hidden tokens as well,
    and a recurrent state takes them in.
    """
    body: Any = loaded.model.base_model
    config: Any = loaded.model.config
    cache = DynamicCache(config=config)
    plain = getattr(config.get_text_config(), "_attn_implementation", None) in ("sdpa", "eager")
    if not plain or any(type(layer) is not DynamicLayer for layer in cache.layers) or not cache.layers:
        return None
    if not all(_accepts(body, name) for name in ("position_ids", "past_key_values")):
        return None
    in_order = sorted(map(tuple, ids))
    first, last, limit = in_order[0], in_order[-1], min(map(len, ids)) - 1
    shared = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b or i >= limit), 0)
    if shared * (len(ids) - 1) < SHARED_TOKENS:
        return None
    tokens_1S = torch.tensor([first[:shared]], device=loaded.device)
    positions_1S = torch.arange(shared, device=loaded.device)[None]
    inputs = _inputs(body, tokens_1S, torch.ones_like(tokens_1S), positions_1S)
    body(**inputs, past_key_values=cache, use_cache=True)
    return cache if cache.get_seq_length() == shared else None


@torch.inference_mode()
def _read_rest(
    loaded: LoadedModel, beginning: DynamicCache, prompts: Sequence[Sequence[int]]
) -> Float[Tensor, "row 1 point d_model"]:
    """As ``_read_prompt`` gives it of the whole prompts."""
    body: Any = loaded.model.base_model
    config: Any = loaded.model.config
    shared, n = beginning.get_seq_length(), len(prompts)
    rest = pad_left([prompt[shared:] for prompt in prompts], loaded.tokenizer.pad_token_id or 0, loaded.device)
    mask_BT = torch.nn.functional.pad(rest.attention_mask, (shared, 0), value=1)
    cache = DynamicCache(config=config)
    layers: list[Any] = beginning.layers
    for index, layer in enumerate(layers):
        keys, values = (states.expand(n, -1, -1, -1) for states in (layer.keys, layer.values))
        cache.update(keys, values, index)
    with last_position(loaded.architecture.layers) as record:
        body(
            **_inputs(body, rest.input_ids, mask_BT, rest.position_ids + shared), past_key_values=cache, use_cache=True
        )
    return record.take()[:, None]


@torch.inference_mode()
def _read_answer(
    loaded: LoadedModel, batch: PaddedBatch, answer_tokens: int, opening: Sequence[int]
) -> Float[Tensor, "row position point d_model"]:
    """Greedy decoding behind the opening, with a key-value cache, which is freed with the batch."""
    model, end_ids = loaded.model, torch.tensor(loaded.eos_token_ids, device=loaded.device)
    keep_one = {"logits_to_keep": 1} if _accepts(model, "logits_to_keep") else {}
    tokens_BT, mask_BT, positions_BT, cache = batch.input_ids, batch.attention_mask, batch.position_ids, None
    ended_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=loaded.device)
    read: list[Float[Tensor, "row point d_model"]] = []
    with last_position(loaded.architecture.layers) as record:
        while True:
            inputs = _inputs(model, tokens_BT, mask_BT, positions_BT)
            output = model(**inputs, **keep_one, past_key_values=cache, use_cache=True)
            latest_BLD = record.take()
            if read:
                latest_BLD[ended_B.cpu()] = read[-1][ended_B.cpu()]
            read.append(latest_BLD)
            tokens_BT = output.logits[:, -1:].argmax(dim=-1)
            if len(read) <= len(opening):
                tokens_BT = torch.full_like(tokens_BT, opening[len(read) - 1])
            ended_B = ended_B | torch.isin(tokens_BT[:, 0], end_ids)
            if len(read) == 1 + answer_tokens or ended_B.all():
                break
            cache = output.past_key_values
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
            positions_BT = positions_BT[:, -1:] + 1
    read += [read[-1]] * (1 + answer_tokens - len(read))
    return torch.stack(read, dim=1)


def _inputs(module: nn.Module, tokens_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT}
    return inputs | ({"position_ids": positions_BT} if _accepts(module, "position_ids") else {})


def _accepts(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


def _check_finite(batch_BPLD: Float[Tensor, "row position point d_model"], rows: list[int]) -> None:
    broken_BPL = ~torch.isfinite(batch_BPLD).all(dim=-1)
    if not broken_BPL.any():
        return
    # Rows are sorted by length: name the first prompt in the caller's order.
    row = min(broken_BPL.any(dim=(1, 2)).nonzero().flatten().tolist(), key=lambda row: rows[row])
    position, point = broken_BPL[row].nonzero()[0].tolist()
    where = "the embedding output" if point == 0 else f"the output of layer {point - 1}"
    at = "its last token" if position == 0 else f"answer token {position}"
    raise ModelError(
        f"residuals of prompt {rows[row]} are not finite in {where} at {at}:"
        " put bfloat16 or float32 first in model.dtypes, or leave this prompt out"
    )
