"""Tokens are drawn from the right distribution, each row in its own way and from its own seed."""

import pytest
import torch

from serve.engine.sampling import CANDIDATES, Sampler, Sampling, Uniforms, token_logprobs

VOCABULARY = 50


def logits(rows: int = 1, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def row(temperature: float = 1.0, top_p: float = 1.0, seed: int | None = 0, top: int | None = None) -> Sampling:
    return Sampling(temperature, top_p, Uniforms(seed), top)


def draw(logits_1V: torch.Tensor, temperature: float, top_p: float, n: int) -> torch.Tensor:
    """Frequencies of n tokens."""
    sampler = Sampler([row(temperature, top_p, seed) for seed in range(n)], "cpu")
    found = torch.tensor(sampler.choose(logits_1V.expand(n, -1)).token_ids)
    return torch.bincount(found, minlength=logits_1V.shape[-1]) / n


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    one = logits()
    expected = (one[0] / temperature).softmax(-1)
    order = expected.argsort(descending=True)
    before = expected[order].cumsum(0) - expected[order]
    expected[order[before >= top_p]] = 0
    expected = expected / expected.sum()
    n = 4000
    found = draw(one, temperature, top_p, n)
    assert not found[expected == 0].any(), "a token outside of the nucleus"
    assert ((found - expected).abs() < 5 * (expected / n).sqrt() + 1e-3).all()


def test_a_nucleus_wider_than_the_candidates() -> None:
    """Of 2000 equal tokens nine tenths are drawn from, not just the first few hundred."""
    flat = torch.zeros(1, 4 * CANDIDATES)
    found = draw(flat, 1.0, 0.9, 4000)
    assert (found > 0).sum() > 1.5 * CANDIDATES


def test_a_wide_nucleus_is_the_one_that_sorting_finds() -> None:
    """On a vocabulary of which the nucleus takes more than the candidates."""
    one = 0.5 * logits(1, 5, 4000)
    expected = one[0].softmax(-1)
    order = expected.argsort(descending=True)
    inside = set(order[: int((expected[order].cumsum(0) < 0.6).sum()) + 1].tolist())
    assert len(inside) > CANDIDATES
    found = draw(one, 1.0, 0.6, 4000).nonzero()[:, 0].tolist()
    assert set(found) <= inside and len(found) > 0.9 * len(inside)


def test_a_row_s_token_does_not_depend_on_whether_a_neighbour_s_nucleus_is_wide() -> None:
    peaked, flat = 6 * logits(1, 1, 4000), torch.zeros(1, 4000)

    def tokens(batch: list[torch.Tensor]) -> list[int]:
        sampler = Sampler([row(1.0, 0.9, seed) for seed in range(len(batch))], "cpu")
        return [sampler.choose(torch.cat(batch)).token_ids[0] for _ in range(50)]

    assert tokens([peaked]) == tokens([peaked, flat]) and len(set(tokens([peaked]))) > 1


def test_greedy_is_the_largest_logit_and_tiny_temperatures_do_not_overflow() -> None:
    some = logits(3)
    for temperature in (0.0, 1e-9, 1e-3):
        choices = Sampler([row(temperature) for _ in range(3)], "cpu").choose(some)
        assert choices.token_ids == some.argmax(-1).tolist()
    assert Sampler([row(top_p=0.0)] * 3, "cpu").choose(some).token_ids == some.argmax(-1).tolist()


def test_a_seed_gives_the_same_tokens_whatever_the_neighbours_do() -> None:
    some = logits(5, seed=1)

    def tokens(neighbours: list[Sampling], at: int, top_p: float) -> list[int]:
        rows = [*neighbours[:at], row(1.3, top_p, seed=7), *neighbours[at:]]
        batch = torch.stack([some[0] if i == at else some[i % 4 + 1] for i in range(len(rows))])
        sampler = Sampler(rows, "cpu")
        return [sampler.choose(batch).token_ids[at] for _ in range(200)]

    for top_p in (1.0, 0.7):
        alone = tokens([], 0, top_p)
        assert len(set(alone)) > 3
        assert tokens([row(0.0), row(2.0, 0.5, seed=7), row(1.0, 1.0, None), row(0.0, top=3)], 2, top_p) == alone
    assert [Uniforms(3)() for _ in range(2)] == [Uniforms(3)()] * 2 != [Uniforms(4)()] * 2


def test_no_seed_is_a_new_seed() -> None:
    assert [Uniforms(None)() for _ in range(3)] != [Uniforms(None)() for _ in range(3)]


def test_logprobs_are_of_the_untempered_distribution() -> None:
    some = logits(4, seed=2)
    rows = [row(0.0, top=2), row(0.3, 0.5, top=0), row(), row(1.5, top=20)]
    choices = Sampler(rows, "cpu").choose(some)
    expected = some.log_softmax(-1)
    assert set(choices.logprobs) == {0, 1, 3}
    for i, entry in choices.logprobs.items():
        assert entry.token_id == choices.token_ids[i]
        assert entry.logprob == pytest.approx(expected[i, entry.token_id].item(), abs=1e-6)
        assert len(entry.top) == rows[i].top_logprobs
        best = expected[i].topk(rows[i].top_logprobs)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_logprobs_of_half_precision_logits_are_computed_in_single_precision() -> None:
    low = logits(2).bfloat16()
    entry = token_logprobs(low, torch.tensor([3, 4]), 1)[0]
    assert entry.logprob == pytest.approx(low[0].float().log_softmax(-1)[3].item(), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_whose_logits_are_no_numbers_are_told_apart(bad: float) -> None:
    some = logits(3)
    some[1, 4] = bad
    choices = Sampler([row(0.0), row(0.0), row(0.0)], "cpu").choose(some)
    assert choices.token_ids[1] == -1 and min(choices.token_ids[0], choices.token_ids[2]) >= 0


def test_excluded_tokens_are_fine() -> None:
    some = logits(2)
    some[:, 10:] = -float("inf")
    for top_p in (1.0, 0.9):
        choices = Sampler([row(top_p=top_p, seed=s) for s in range(2)], "cpu").choose(some)
        assert all(0 <= token < 10 for token in choices.token_ids)
