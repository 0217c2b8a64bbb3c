"""The loss terms against what their formulas give by hand, and what belongs to a behaviour."""

import math

import torch

from bruno_ray.learning.losses import (
    answer_loss,
    behaviour_tokens,
    induce_loss,
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
