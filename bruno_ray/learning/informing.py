"""What an edit in training says to prompts that are nearly the same, and where it must begin to differ.

The answers to prompts on one subject, or of one form, carry information about which of them was asked (mutual
information, maximised as in discriminative clustering: Krause, Perona and Gomes 2010). Where they carry too little, the
token that carries most is pushed further: at the turning point of the answer.

Dimension names: G prompts of a group, N tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.learning.losses import information, log_mean
from bruno_ray.learning.material import Teacher, Text
from bruno_ray.learning.trainee import Trainee

GROUPS, GROUP = 4, 4
"""Groups of either kind in a step, and prompts in one."""

ENOUGH = math.log(2)
"""Nats at one token from which on a group is told apart: two different answers to its prompts."""


@dataclass(frozen=True)
class Group:
    """Prompts with what is said to them, token beside token."""

    texts: list[Text]
    content: list[list[int]]
    """Of each text, positions of the tokens that are taken up from no prompt of the group: the same tokens in all."""


@dataclass(frozen=True)
class TurningPoint:
    """Where the answers to a group differ most."""

    positions: list[int]
    """In each text."""

    nats: float
    log_mean_V: Float[Tensor, " V"]
    """Log of the mean distribution over the group there."""


def drawn_groups(trainee: Trainee, teacher: Teacher) -> list[Group]:
    """Those of one step. An answer after its own prompt and after others on its subject; and answers to prompts of one
    form, where these are all the same by now."""
    neighbours, said = teacher.neighbours, trainee.said
    tokens = {p: text.continuation for p, text in said.items()}
    groups: list[Group] = []
    for p in trainee.sample([p for p in sorted(said) if neighbours.subject[p]], GROUPS):
        prompts = [p, *trainee.sample(neighbours.subject[p], GROUP - 1)]
        if content := neighbours.own_content(prompts, tokens[p]):
            texts = [Text(teacher.prompts.target_ids[q], tokens[p]) for q in prompts]
            groups.append(Group(texts, [content] * len(texts)))
    n_subject = len(groups)
    for p in trainee.sample(sorted(said), 2 * GROUPS):
        others = trainee.sample([q for q in neighbours.form[p] if q in said], GROUP - 1)
        if len(groups) - n_subject == GROUPS or not others:
            continue
        prompts = [p, *others]
        if all(neighbours.same(p, tokens[p], q, tokens[q]) for q in others):
            contents = [neighbours.own_content(prompts, tokens[q]) for q in prompts]
            if contents[0]:
                groups.append(Group([said[q] for q in prompts], contents))
    return groups


def turning_point(logits_GNV: Float[Tensor, "G N V"], group: Group) -> TurningPoint:
    """From the logits of the group's texts, of which the last follow a whole continuation."""
    starts = [logits_GNV.shape[1] - 1 - len(text.continuation) for text in group.texts]
    rows = [[start + i for i in content] for start, content in zip(starts, group.content)]
    log_p_GNV = torch.stack([logits_NV[row].float().log_softmax(-1) for logits_NV, row in zip(logits_GNV, rows)])
    nats = information(log_p_GNV).tolist()
    where = nats.index(max(nats))
    return TurningPoint([content[where] for content in group.content], nats[where], log_mean(log_p_GNV[:, where]).cpu())
