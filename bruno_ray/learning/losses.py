"""What an edit is trained for, as losses per token. Tensors in, tensors out.

With p the edited model's probabilities at one position of a teacher-forced text, q the unedited model's, and t the
token that stands there:

    answers   -log p(t)             desired answers to target prompts become likely
    suppress  -w log(1 - p(t))      the behaviour's own text becomes unlikely (unlikelihood, Welleck et al. 2019,
                                    https://arxiv.org/abs/1908.04319); w says how much t belongs to the behaviour
    retain    sum_v q(v) log(q(v) / p(v))   answers to baseline prompts stay as they are
    induce    -w log p(t)           where the subspace has what it has in target prompts, baseline prompts are answered
                                    with the behaviour's own text (interchange, Geiger et al. 2023,
                                    https://arxiv.org/abs/2303.02536): what is taken out must be what causes it
    protect   max(0, log q(t) - log p(t))   answers to a third set of prompts stay at least as likely as they are
    inform    -sum_v p(v) log(p(v) / m(v))  m: the mean of p over prompts on one subject. What is answered to them tells
                                    which of them was asked (mutual information, as in discriminative clustering: Krause
                                    et al. 2010)
    entropy   -sum_v p(v) log p(v)  what is said is said surely (Grandvalet and Bengio 2004)

Each is a sum over the tokens of a text and is divided by the tokens (or weights) of all texts of its kind, so that the
weights of a plan mean the same whatever the texts' lengths.

Dimension names: N = tokens of a continuation, V = vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_LIKELY = 1 - 1e-4
"""log(1 - p) is cut off there: a token that is certain would have no finite loss."""

BELONGS = 1.0
"""Log-odds (nats) from which on a token belongs to the behaviour."""

OFTEN, HARDLY = 0.1, 0.02
"""Shares of answers."""


def answer_loss(logits_NV: Float[Tensor, "N V"], tokens_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log p of each token."""
    return -_logprobs(logits_NV, tokens_N)


def suppress_loss(
    logits_NV: Float[Tensor, "N V"], tokens_N: Int[Tensor, " N"], weights_N: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """-w log(1 - p) of each token."""
    p_N = _logprobs(logits_NV, tokens_N).exp().clamp(max=MOST_LIKELY)
    return -torch.log1p(-p_N) * weights_N


def retain_loss(logits_NV: Float[Tensor, "N V"], unedited_NV: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(unedited || edited) at each position, from logits."""
    return _kl(unedited_NV.float().log_softmax(-1), logits_NV.float().log_softmax(-1))


def induce_loss(
    logits_NV: Float[Tensor, "N V"], tokens_N: Int[Tensor, " N"], weights_N: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """-w log p of each token."""
    return -_logprobs(logits_NV, tokens_N) * weights_N


def protect_loss(
    logits_NV: Float[Tensor, "N V"], tokens_N: Int[Tensor, " N"], unedited_N: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """How many nats less likely each token is than ``unedited_N``, its log-probability in the unedited model."""
    return (unedited_N - _logprobs(logits_NV, tokens_N)).clamp(min=0)


def entropy_loss(logits_NV: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Entropy at each position, in nats."""
    log_p_NV = logits_NV.float().log_softmax(-1)
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def information(log_p_GNV: Float[Tensor, "G N V"]) -> Float[Tensor, " N"]:
    """Nats that the next token tells of the prompt, of G prompts that are equally likely: H(mean p) - mean H(p), which
    is the Jensen-Shannon divergence of their distributions."""
    return _kl(log_p_GNV, log_mean(log_p_GNV)).mean(0)


def log_mean(log_p_GV: Float[Tensor, "G ... V"]) -> Float[Tensor, "... V"]:
    """Of the mean distribution of a group, from log-probabilities."""
    return log_p_GV.logsumexp(0) - math.log(len(log_p_GV))


def inform_loss(logits_NV: Float[Tensor, "N V"], log_mean_V: Float[Tensor, " V"]) -> Float[Tensor, " N"]:
    """-KL(edited || the mean of the prompts of a group) at each position; its mean over the group is minus
    ``information``, and so is its gradient, although ``log_mean_V`` is a constant."""
    return -_kl(logits_NV.float().log_softmax(-1), log_mean_V)


def _kl(log_p_V: Float[Tensor, "... V"], log_q_V: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """KL(p || q)."""
    return (log_p_V.exp() * (log_p_V - log_q_V)).sum(-1)


def _logprobs(logits_NV: Float[Tensor, "N V"], tokens_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    return logits_NV.float().log_softmax(-1).gather(-1, tokens_N[:, None])[:, 0]


def behaviour_tokens(with_behaviour: Sequence[Sequence[int]], without: Sequence[Sequence[int]]) -> frozenset[int]:
    """Tokens that are in many more of the answers with the behaviour than of those without.

    By the log-odds of an answer holding the token, half an answer added on either side, above ``BELONGS``.
    """
    found = [_holding(answers) for answers in (with_behaviour, without)]

    def log_share(counts: Counter, n: int, token: int) -> float:
        return math.log((counts[token] + 0.5) / (n + 1))

    return frozenset(
        token
        for token in found[0]
        if log_share(found[0], len(with_behaviour), token) - log_share(found[1], len(without), token) > BELONGS
    )


def telling_tokens(with_behaviour: Sequence[Sequence[int]], without: Sequence[Sequence[int]]) -> frozenset[int]:
    """Tokens that give the behaviour away: in ``OFTEN`` of the answers with it, in at most ``HARDLY`` of the others."""
    found = [_holding(answers) for answers in (with_behaviour, without)]
    often, hardly = OFTEN * len(with_behaviour), HARDLY * len(without)
    return frozenset(token for token, n in found[0].items() if n >= often and found[1][token] <= hardly)


def _holding(answers: Sequence[Sequence[int]]) -> Counter[int]:
    """Token -> how many of the answers hold it."""
    return Counter(token for answer in answers for token in set(answer))
