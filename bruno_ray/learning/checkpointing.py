"""Gradient checkpointing: layers keep their input alone and compute the rest again on the way back.

Chen et al. 2016, https://arxiv.org/abs/1604.06174. It costs about a third more time, and memory falls from all
activations of all layers to those of one. transformers' own switch works in training mode only, which brings dropout.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it forward and backward pass of these layers are checkpointed, hooks inside of them included. What the
    hooks depend on must stay as it is until the gradients are there."""
    own = [vars(layer).get("forward") for layer in layers]  # accelerate puts one into a layer that it offloads
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in zip(layers, own):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward
