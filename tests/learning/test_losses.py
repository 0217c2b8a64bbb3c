"""The loss terms against what their formulas give by hand, and what belongs to a behaviour."""

import math

import pytest
import torch

from bruno_ray.learning.losses import (
    answer_loss,
    behaviour_tokens,
    entropy_loss,
    induce_loss,
    inform_loss,
    information,
    protect_loss,
    retain_loss,
    suppress_loss,
    telling_tokens,
)
from bruno_ray.scoring.kl_divergence import kl_of_logits


def test_the_terms_are_their_formulas() -> None:
    logits_NV = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    tokens_N = torch.tensor([1, 2])
    torch.testing.assert_close(answer_loss(logits_NV, tokens_N), -torch.log(torch.tensor([0.25, 0.8])))
    weights_N = torch.tensor([1.0, 0.5])
    wanted_N = torch.tensor([-torch.log(torch.tensor(0.75)), -0.5 * torch.log(torch.tensor(0.2))])
    torch.testing.assert_close(suppress_loss(logits_NV, tokens_N, weights_N), wanted_N)
    assert bool((retain_loss(logits_NV, logits_NV).abs() < 1e-6).all())
    wanted_N = -torch.log(torch.tensor([0.25, 0.8])) * weights_N
    torch.testing.assert_close(induce_loss(logits_NV, tokens_N, weights_N), wanted_N)


def test_what_is_protected_may_become_likelier_and_not_less_likely() -> None:
    logits_NV = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])).requires_grad_(True)
    unedited_N = torch.log(torch.tensor([0.5, 0.4]))  # the first token was twice as likely, the second half as likely
    loss_N = protect_loss(logits_NV, torch.tensor([1, 2]), unedited_N)
    torch.testing.assert_close(loss_N, torch.tensor([math.log(2), 0.0]))
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    assert gradient_NV[0, 1] < 0 and bool((gradient_NV[1] == 0).all())


def test_the_retain_term_is_the_kl_that_a_trial_is_scored_by() -> None:
    generator = torch.Generator().manual_seed(0)
    edited_NV, unedited_NV = torch.randn(2, 4, 9, generator=generator)
    found_N, wanted_N = retain_loss(edited_NV, unedited_NV), kl_of_logits(unedited_NV, edited_NV)
    torch.testing.assert_close(found_N.double(), wanted_N, rtol=1e-5, atol=1e-6)


def test_information_is_what_a_token_tells_of_its_prompt() -> None:
    """A bit if two prompts are answered with different tokens, none if with the same, in between what mutual
    information is by its definition."""
    apart, alike = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[0.3, 0.7]], [[0.3, 0.7]]])
    torch.testing.assert_close(information((apart + 1e-9).log()), torch.tensor([math.log(2)]))
    assert float(information(alike.log())) == pytest.approx(0, abs=1e-7)
    p_GNV = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    mean_NV = p_GNV.mean(0)
    wanted_N = -(mean_NV * mean_NV.log()).sum(-1) + (p_GNV * p_GNV.log()).sum(-1).mean(0)
    torch.testing.assert_close(information(p_GNV.log()), wanted_N)


def test_the_inform_term_has_the_gradient_of_the_information() -> None:
    """Although the mean over the group is a constant to it."""
    logits_GNV = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    told = information(logits_GNV.log_softmax(-1)).sum()
    (wanted,) = torch.autograd.grad(-told, logits_GNV)
    log_mean_V = (logits_GNV.log_softmax(-1).logsumexp(0) - math.log(4))[0].detach()
    loss = sum(inform_loss(logits_NV, log_mean_V).sum() for logits_NV in logits_GNV) / 4
    (found,) = torch.autograd.grad(loss, logits_GNV)
    assert float(loss.detach()) == pytest.approx(-float(told.detach()))
    torch.testing.assert_close(found, wanted)


def test_entropy_is_that_of_the_distribution() -> None:
    torch.testing.assert_close(entropy_loss(torch.zeros(2, 8)), torch.full((2,), math.log(8)))
    assert float(entropy_loss(torch.tensor([[50.0, 0.0]]))) == pytest.approx(0, abs=1e-6)


def test_a_certain_token_has_a_finite_loss_and_a_gradient_that_is_a_number() -> None:
    logits_NV = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    loss_N = suppress_loss(logits_NV, torch.tensor([0]), torch.ones(1))
    (gradient,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    assert bool(torch.isfinite(loss_N).all() and torch.isfinite(gradient).all())


def test_tokens_of_the_behaviour_are_those_that_other_answers_lack() -> None:
    sorry, comma, the, end = 1, 2, 3, 4
    behaviour = [(sorry, comma, the, end)] * 10
    baseline = [(the, end)] * 10
    assert behaviour_tokens(behaviour, baseline) == {sorry, comma}
    assert telling_tokens(behaviour, baseline) == {sorry, comma}
    rare = [*behaviour, (5, the)]  # in one of eleven answers: it may belong, it does not tell
    assert 5 not in telling_tokens(rare, baseline)
    assert comma not in telling_tokens(behaviour, [*baseline, (comma,)])
