"""What each module writes to the residual stream, on average, while the model shows the behaviour.

Put into a subspace in place of what a baseline prompt has there, it must cause the behaviour, if the subspace carries
it (interchange interventions, Geiger et al. 2023, https://arxiv.org/abs/2303.02536); see ``losses.induce_loss``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.lean_forward import own_forward
from bruno_ray.learning.material import Text
from bruno_ray.model.batching import TokenBudget, map_batches, pad_left

Outputs = tuple[Float[Tensor, " d"] | None, ...]
"""One per writer of an architecture."""


def mean_outputs(engine: BatchEngine, texts: Sequence[Text], batch_tokens: int = 0) -> Outputs:
    """Mean output of each writer of the unedited model, over all positions that a token of a continuation follows.

    Float32 on the CPU, without the modules' biases. None for a writer whose output has a part for each expert: what
    they write is weighted afterwards.
    """
    writers = engine.loaded.architecture.writers
    sums: list[Tensor | None] = [None] * len(writers)
    read_BT: Bool[Tensor, "B T"]

    def adding(i: int):
        def add(module: object, args: tuple, output: Tensor | tuple) -> None:
            y = output[0] if isinstance(output, tuple) else output
            y_BTd = y.reshape(*read_BT.shape, y.shape[-1])
            total = y_BTd[read_BT.to(y.device)].sum(0, dtype=torch.float32).cpu()
            before = sums[i]
            sums[i] = total if before is None else before + total

        return add

    def forward(rows: list[int]) -> None:
        nonlocal read_BT
        some = [texts[row] for row in rows]
        padded = pad_left([(*text.prompt, *text.continuation) for text in some], 0, engine.device)
        width = padded.input_ids.shape[1]
        read_BT = torch.zeros(len(some), width, dtype=torch.bool)
        for row, text in zip(read_BT, some):
            row[width - len(text.continuation) - 1 : -1] = True
        own_forward(engine.model, padded.input_ids, padded.attention_mask, padded.position_ids, None, 1)

    handles = [
        writer.module.register_forward_hook(adding(i)) for i, writer in enumerate(writers) if writer.stacked == 1
    ]
    try:
        with torch.no_grad():
            lengths = [len(text.prompt) + len(text.continuation) for text in texts]
            for _ in map_batches(forward, lengths, TokenBudget.for_device(engine.device, batch_tokens)):
                pass
    finally:
        for handle in handles:
            handle.remove()
    n = sum(len(text.continuation) for text in texts)
    biases = [writer.read_bias() for writer in writers]
    return tuple(
        None if total is None else total / n - (0 if bias is None else bias.cpu()) for total, bias in zip(sums, biases)
    )
