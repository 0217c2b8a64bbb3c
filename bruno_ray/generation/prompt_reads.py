"""Keys and values of prompts that were read under edits, for what is asked about the same rows next.

    reads = PromptReads()
    answers = engine.generate(ids, edits, 30, reads=reads)
    engine.token_logprobs(ids, others, edits, reads)      # reads the continuations only

Axes: B rows of a batch, T tokens of a prompt (left-padded), C columns of the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.decoding import BufferedLayer, TokenIds

MOST_BYTES = 2**28
"""What is kept in all; rows beyond it are read again when they are needed."""


@dataclass(frozen=True)
class _Batch:
    """Prompts that were read in one forward pass, but for their last tokens."""

    keys_and_values: list[tuple[Tensor, Tensor]]
    """Of each layer, (B, heads, T - 1, head size)."""

    mask_BC: Int[Tensor, "B T-1"]


class PromptReads:
    """Rows by edit and prompt. It holds the edits, whose identity is what tells them apart."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._room = most_bytes
        self._batches: list[_Batch] = []
        self._places: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._edits: list[ResolvedEdit | None] = []

    def keep(
        self,
        cache: DynamicCache,
        mask_BT: Int[Tensor, "B T"],
        prompts: Sequence[TokenIds],
        edits: Sequence[ResolvedEdit | None],
    ) -> None:
        """Copy what ``cache`` holds of whole prompts, row b of ``prompts[b]`` under ``edits[b]``, if there is room."""
        held = [layer.held(-1) for layer in cache.layers if isinstance(layer, BufferedLayer)]
        n_bytes = sum(part.numel() * part.element_size() for pair in held for part in pair)
        if n_bytes > self._room:
            return
        self._room -= n_bytes
        for b, (prompt, edit) in enumerate(zip(prompts, edits)):
            self._places[id(edit), tuple(prompt)] = len(self._batches), b
        self._edits += edits
        copied = [(keys.contiguous(), values.contiguous()) for keys, values in held]
        self._batches.append(_Batch(copied, mask_BT[:, :-1].clone()))

    def has(self, edit: ResolvedEdit | None, prompt: TokenIds) -> bool:
        return (id(edit), tuple(prompt)) in self._places

    def caches(
        self,
        config: PreTrainedConfig,
        edits: Sequence[ResolvedEdit | None],
        prompts: Sequence[TokenIds],
        n_new: int,
        most_rows: int,
    ) -> Iterator[tuple[list[int], DynamicCache, Int[Tensor, "B C"]]]:
        """Rows that ``has`` knows, in batches of those that were read together: their indices, a cache of their own
        with room for ``n_new`` tokens from the prompt's last one on, and its mask."""
        found: dict[int, list[tuple[int, int]]] = {}
        for row, (edit, prompt) in enumerate(zip(edits, prompts)):
            batch, b = self._places[id(edit), tuple(prompt)]
            found.setdefault(batch, []).append((row, b))
        for number, members in found.items():
            batch = self._batches[number]
            for start in range(0, len(members), most_rows):
                part = members[start : start + most_rows]
                index = torch.tensor([b for _, b in part])
                cache = DynamicCache(config=config)
                cache.layers = []
                for keys, values in batch.keys_and_values:
                    layer = BufferedLayer(keys.shape[2] + n_new)
                    layer.update(keys[index], values[index])
                    cache.layers.append(layer)
                yield [row for row, _ in part], cache, batch.mask_BC[index]
