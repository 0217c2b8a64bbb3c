"""Where answers to prompts that ask nearly the same must begin to differ."""

import math

import pytest
import torch

from bruno_ray.learning.informing import Group, turning_point
from bruno_ray.learning.losses import information
from bruno_ray.learning.material import Text

V = 7
NAMES = [(4,), (4, 5), (6, 4, 5)]
IS, OAK, END = 1, 2, 3


def test_a_turning_point_is_found_in_answers_of_unequal_lengths() -> None:
    """Names of one to three tokens before "is oak": the rows are aligned at their ends, as a batch is."""
    texts = [Text((0,), (*name, IS, OAK, END)) for name in NAMES]
    group = Group(texts, [[len(name), len(name) + 1, len(name) + 2] for name in NAMES])
    logits_GNV = torch.randn(3, 1 + max(len(text.continuation) for text in texts), V) * 0.1
    for g in range(3):
        logits_GNV[g, -3, 4 + g] += 9  # the token before the last: what it was asked decides it
    point = turning_point(logits_GNV, group)
    assert point.positions == [len(name) + 1 for name in NAMES]
    at = logits_GNV[:, -3].log_softmax(-1)
    assert point.nats == pytest.approx(float(information(at[:, None])), abs=1e-5) and point.nats > math.log(2)
    assert torch.allclose(point.log_mean_V.exp(), at.exp().mean(0), atol=1e-6)
