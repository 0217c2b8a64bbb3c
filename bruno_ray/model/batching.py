"""Batches of prompts of similar length under a token budget, and what to do when one does not fit.

A forward pass costs rows x padded length, so the budget is in tokens, padding included. Prompts are sorted by
length (longest first): little is padded, the most expensive batch comes first, and the order of the results is
the caller's because every batch is a list of row indices:

    budget = TokenBudget.for_device(device)
    for rows, result in map_batches(forward, lengths, budget):
        output[rows] = result

The budget doubles on a GPU while throughput and free memory allow, and halves when memory runs out.
"""

import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from bruno_ray.errors import ModelError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

CPU_TOKENS = 2048  # a matrix product with this many rows is already bound by arithmetic, larger ones only cost memory
GPU_START_TOKENS = 2048
GPU_MAX_TOKENS = 2**20
WORTHWHILE = 1.1  # a doubling that gains less throughput than this is taken back
MEMORY_SHARE = 0.8  # of the free memory that a doubled batch may need


ALLOCATOR_PHRASES = ("out of memory", "can't allocate memory", "not enough memory")
ACCELERATE_PHRASES = ("offload", "don't have enough GPU RAM")


@dataclass
class TokenBudget:
    """Tokens of one forward pass (rows x padded length), adapted while batches run.

    It may live as long as its model, so that what one call has found out serves the next.
    """

    tokens: int
    growing: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    maximum: int = GPU_MAX_TOKENS
    _best_rate: float = 0.0  # tokens per second before the last doubling
    _grown: bool = False

    @classmethod
    def for_device(cls, device: torch.device | str, tokens: int = 0, cpu_tokens: int = CPU_TOKENS) -> "TokenBudget":
        """The budget a setting of `tokens` means; 0 finds it.

        On a CPU the default is a constant, `cpu_tokens`: batch size would otherwise depend on the machine's load, and
        with it the last bits of every result.
        """
        device = torch.device(device)
        if tokens > 0:
            return cls(tokens, device=device)
        if device.type == "cuda":
            return cls(GPU_START_TOKENS, growing=True, device=device)
        return cls(cpu_tokens, device=device)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a batch that fitted: double the budget, keep it, or take the last doubling back."""
        if not self.growing or 2 * tokens <= self.tokens:  # a batch that was not full says nothing
            return
        rate = tokens / max(seconds, 1e-9)
        if rate < WORTHWHILE * self._best_rate:
            self.growing = False
            if self._grown:
                self.tokens //= 2
        elif 2 * self.tokens > self.maximum or not self._has_room():
            self.growing = False
        else:
            self._best_rate, self._grown = rate, True
            self.tokens *= 2

    def shrink(self, tokens: int) -> None:
        """Memory did not suffice for a batch of `tokens`: allow half of it and stop growing."""
        self.tokens = max(1, min(self.tokens, tokens // 2))
        self.growing = False

    def _has_room(self) -> bool:
        """Whether a batch twice as large will fit, judged by what the allocator took for the last one."""
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        scratch = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return 2 * scratch <= MEMORY_SHARE * (free + scratch)


def batches(lengths: Sequence[int], budget: TokenBudget) -> Iterator[list[int]]:
    """Index lists that cover `lengths` once, longest first. Reads the budget anew for every batch.

    A row longer than the whole budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        n_rows = max(1, budget.tokens // max(1, lengths[order[start]]))
        yield order[start : start + n_rows]
        start += n_rows


def run_with_backoff(
    fn: Callable[[list[int]], Result], rows: list[int], lengths: Sequence[int], budget: TokenBudget
) -> Iterator[tuple[list[int], Result]]:
    """Yield (rows, fn(rows)), in halves where memory runs out. `fn` must be able to run again on the same rows.

    Raises:
        ModelError: one row alone does not fit.
    """
    pending = [rows]
    while pending:
        rows = pending.pop()
        tokens = len(rows) * max(lengths[row] for row in rows)
        start = time.perf_counter()
        try:
            result, fitted = fn(rows), True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise ModelError(
                    f"not enough memory for one prompt of {tokens} tokens: lower residuals.max_tokens, load the model"
                    " with model.quantization=bnb_4bit, or use a device with more memory"
                ) from error
            fitted = False
        # Outside the handler: the exception's traceback would keep the failed pass's tensors alive.
        if fitted:
            budget.observe(tokens, time.perf_counter() - start)
            yield rows, result
        else:
            budget.shrink(tokens)
            release_memory()
            logger.warning("out of memory with %d rows (%d tokens): the batch is halved", len(rows), tokens)
            half = len(rows) // 2
            pending += [rows[half:], rows[:half]]


def map_batches(
    fn: Callable[[list[int]], Result], lengths: Sequence[int], budget: TokenBudget
) -> Iterator[tuple[list[int], Result]]:
    """Run `fn` over all rows in batches; yields (rows, result) as they are done, each row once."""
    for rows in batches(lengths, budget):
        yield from run_with_backoff(fn, rows, lengths, budget)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, while a model was loaded or while it ran, on any device.

    CUDA has an exception of its own; the CPU and MPS allocators raise a plain RuntimeError, accelerate a ValueError
    for a model that does not fit the devices that it may use.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    phrases = ALLOCATOR_PHRASES if isinstance(error, RuntimeError) else ()
    phrases = ACCELERATE_PHRASES if isinstance(error, ValueError) else phrases
    return any(phrase in str(error) for phrase in phrases)


def input_device(embedding: nn.Module) -> torch.device:
    """Where inputs go: to the embedding, or to the CPU if it is offloaded (accelerate moves them from there)."""
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def release_memory() -> None:
    """Give back what failed allocations have left in caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts of one forward pass, padded on the left so that every prompt ends in the last column."""

    input_ids: Int[Tensor, "row position"]
    attention_mask: Int[Tensor, "row position"]
    position_ids: Int[Tensor, "row position"]  # counted from each row's first real token; 0 in the padding


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> PaddedBatch:
    """Stack token id lists of different lengths; padding is masked and moves no position.

    Without explicit position ids a model with learned positions (gpt2) would count the padding.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    real = np.arange(width) >= width - lengths[:, None]
    ids = np.full(real.shape, pad_id, dtype=np.int64)
    ids[real] = np.fromiter(itertools.chain.from_iterable(sequences), dtype=np.int64, count=int(lengths.sum()))
    input_ids, attention_mask = torch.from_numpy(ids), torch.from_numpy(real.astype(np.int64))
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return PaddedBatch(input_ids.to(device), attention_mask.to(device), position_ids.to(device))
