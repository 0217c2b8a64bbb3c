"""Biases, penalties, top_k and min_p do what transformers' processors do, row by row; rows without do not notice."""

from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve.engine.sampling import CANDIDATES, Sampler, Sampling, Uniforms
from serve.engine.shaping import Penalties, Shaper, Shaping
from tests.serve.test_sampling import VOCABULARY, logits
from tests.support.engine_helpers import answers, edited_copy, engine_of, load, prompt, request, together

PROMPT = [3, 5, 5, 7]
ANSWER = [9, 3, 9, 9, 11]
ALL = [
    Penalties(),
    Penalties(repetition=1.4),
    Penalties(repetition=0.7),
    Penalties(presence=0.8, frequency=0.3),
    Penalties(frequency=-0.5),
    Penalties(bias=((4, 3.5), (9, -100.0))),
    Penalties(1.2, -1.0, 0.6, ((9, 2.0), (3, -1.5))),
]


def shaping(penalties: Penalties, prompt: list[int] | None = None, answer: list[int] | None = None) -> Shaping:
    prompt = PROMPT if prompt is None else prompt
    return Shaping(penalties, [*prompt, *(ANSWER if answer is None else answer)], len(prompt))


def expected(logits_V: torch.Tensor, asked: Penalties, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Bias and repetition by transformers; presence and frequency as OpenAI's API reference writes them:
    mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence."""
    processors = LogitsProcessorList()
    if asked.bias:
        processors.append(SequenceBiasLogitsProcessor([[[token_id], value] for token_id, value in asked.bias]))
    if asked.repetition != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(asked.repetition))
    scores_V = processors(torch.tensor([[*prompt, *answer]]), logits_V[None].float().clone())[0]
    for token_id, count in Counter(answer).items():
        scores_V[token_id] -= count * asked.frequency + asked.presence
    return scores_V


# ----- penalties and biases -----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_shaped_as_transformers_shapes_it_and_the_others_are_left_alone(dtype: torch.dtype) -> None:
    some = logits(len(ALL) + 2, seed=4).to(dtype)
    before = some.clone()
    found = Shaper([None, *map(shaping, ALL), None], "cpu")(some)
    assert found.dtype == torch.float32 and torch.equal(some, before)
    assert torch.equal(found[[0, -1]], some[[0, -1]].float())
    for i, penalties in enumerate(ALL, 1):
        torch.testing.assert_close(found[i], expected(some[i], penalties, PROMPT, ANSWER), atol=1e-6, rtol=1e-6)


def test_what_is_said_counts_from_then_on_also_in_another_batch() -> None:
    """Rows come and go, and each goes on with its own history."""
    some = logits(3, seed=6)
    prompts = [[3, 5], [1] * 7, []]
    rows = [shaping(ALL[-1], prompt, []) for prompt in prompts]
    said: list[list[int]] = [[], [], []]
    here = [0]
    generator = torch.Generator().manual_seed(0)
    for there in ([0], [0, 1], [2, 1, 0], [1, 2], [1], [0, 2], []):
        shaper = Shaper([rows[i] for i in here], "cpu")
        for _ in range(4):
            found = shaper(some[here])
            for scores_V, i in zip(found, here):
                torch.testing.assert_close(scores_V, expected(some[i], ALL[-1], prompts[i], said[i]))
                token_id = int(torch.randint(0, 6, (), generator=generator))
                said[i].append(token_id)
                rows[i].tokens.append(token_id)
        here = there


def test_tokens_that_can_be_read_but_not_said_are_no_error() -> None:
    row = shaping(Penalties(repetition=2.0), [3, VOCABULARY + 7], [4])
    found = Shaper([row], "cpu")(logits())
    torch.testing.assert_close(found[0], expected(logits()[0], row.penalties, [3], [4]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so(bad: float) -> None:
    some = logits(2)
    some[0, 9] = bad
    rows = [Sampling(0.0, 1.0, Uniforms(0), shaping=shaping(p)) for p in (ALL[5], ALL[6])]
    choices = Sampler(rows, "cpu").choose(some)
    assert choices.token_ids[0] == -1 and choices.token_ids[1] >= 0


def test_logprobs_are_the_model_s_own() -> None:
    some = logits()
    row = Sampling(0.0, 1.0, Uniforms(0), 2, shaping=shaping(ALL[5]))
    (entry,) = Sampler([row], "cpu").choose(some).logprobs.values()
    own = some[0].log_softmax(-1)
    assert entry.logprob == pytest.approx(own[entry.token_id].item(), abs=1e-6)
    assert [token_id for token_id, _ in entry.top] == own.topk(2).indices.tolist()


# ----- what is left to draw from -----

LIMITS = [(1.0, 3, 0.0), (0.6, 5, 0.0), (1.0, 0, 0.2), (0.7, 0, 0.1), (0.8, 10, 0.05), (0.3, 2, 0.9), (1.0, 1, 0.0)]
WIDE = [(1.0, 700, 0.0), (0.9, 900, 0.0), (1.0, 0, 1e-4), (0.95, 1500, 1e-3), (0.9, 600, 0.5), (1.0, 5000, 0.0)]


def probabilities(logits_V: torch.Tensor, temperature: float, top_p: float, top_k: int, min_p: float) -> torch.Tensor:
    """By transformers' warpers, in the order in which ``generate`` applies them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits_V[None].clone())[0].double().softmax(-1)


@pytest.mark.parametrize(
    ("vocabulary", "limits"), [(VOCABULARY, limits) for limits in LIMITS] + [(4000, limits) for limits in WIDE + LIMITS]
)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_token_is_the_one_at_the_uniform_number_of_transformers_distribution(
    vocabulary: int, limits: tuple[float, int, float], temperature: float
) -> None:
    """Token for token: the cumulative distribution in the order of ids, inverted at the row's own number."""
    top_p, top_k, min_p = limits
    one = 0.6 * logits(1, 8, vocabulary)
    until_V = probabilities(one[0], temperature, top_p, top_k, min_p).cumsum(0)
    n = 300
    rows = [Sampling(temperature, top_p, Uniforms(seed), None, top_k, min_p) for seed in range(n)]
    found = Sampler(rows, "cpu").choose(one.expand(n, -1)).token_ids
    numbers = torch.tensor([Uniforms(seed)() for seed in range(n)], dtype=torch.float64)
    agreed = 0
    for token_id, number in zip(found, numbers):
        if (until_V - number).abs().min() < 1e-5:  # at a border rounding decides
            continue
        assert token_id == int(torch.searchsorted(until_V, number, right=True))
        agreed += 1
    assert agreed > 0.9 * n
    if (vocabulary, limits) in [(4000, wide) for wide in WIDE[:2]]:
        assert (until_V.diff() > 0).sum() > CANDIDATES  # the case is the one that it is meant to be


def test_as_likely_as_the_last_of_top_k_is_in() -> None:
    """Also where there are more of them than candidates."""
    for vocabulary in (VOCABULARY, 4 * CANDIDATES):
        flat = torch.zeros(1, vocabulary)
        rows = [Sampling(1.0, 1.0, Uniforms(seed), None, 3) for seed in range(2000)]
        found = set(Sampler(rows, "cpu").choose(flat.expand(2000, -1)).token_ids)
        assert len(found) > 0.5 * min(vocabulary, 2000)
        assert torch.equal(probabilities(flat[0], 1.0, 1.0, 3, 0.0), flat[0].double().softmax(-1))


def test_a_row_without_limits_draws_the_same_tokens_beside_rows_that_have_them() -> None:
    """And rows that are not shaped beside rows that are: to the bit, in half precision too."""
    some = (3 * logits(4, 9, 4000)).bfloat16()
    plain = [Sampling(1.0, 0.9, Uniforms(1)), Sampling(1.3, 1.0, Uniforms(2)), Sampling(0.0, 1.0, Uniforms(3))]
    alone = [Sampler(plain, "cpu").choose(some[:3]).token_ids for _ in range(40)]
    again = [Sampling(1.0, 0.9, Uniforms(1)), Sampling(1.3, 1.0, Uniforms(2)), Sampling(0.0, 1.0, Uniforms(3))]
    other = Sampling(0.8, 0.7, Uniforms(4), None, 700, 0.01, shaping(ALL[6]))
    beside = [Sampler([*again, other], "cpu").choose(some).token_ids[:3] for _ in range(40)]
    assert alone == beside and len({tuple(tokens) for tokens in alone}) > 10


# ----- in the engine -----


@torch.inference_mode()
def generated(model: torch.nn.Module, ids: tuple[int, ...], n_tokens: int, asked: Penalties) -> list[int]:
    """transformers' own greedy decoding."""
    bias = [[[token_id], value] for token_id, value in asked.bias]
    model.generation_config.eos_token_id = None
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=asked.repetition,
        **({"sequence_bias": bias} if bias else {}),
    )
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("room", [{}, {"kv_tokens": 220}])
def test_answers_are_those_of_transformers_generate(room: dict[str, int]) -> None:
    """Of base and edited rows of many lengths, beside rows that ask for nothing; also where rows are put back."""
    loaded = load(seed=5)
    penalties = [
        Penalties(repetition=1.6),
        Penalties(repetition=1.1, bias=((65, 4.0),)),
        Penalties(bias=((70, 100.0),)),
        Penalties(),
        Penalties(repetition=0.6, bias=((80, -2.0),)),
        Penalties(repetition=3.0),
    ]
    asked = [
        request(prompt(4 + 3 * i, i), edit, n_tokens=20 + 20 * i, ignore_eos=True, penalties=None if i == 3 else p)
        for i, (p, edit) in enumerate(zip(penalties, (None, "0", None, "3", "5", None)))
    ]
    with engine_of(loaded, **room) as engine:
        found = together(engine, asked)
        preempted = engine.stats().preemptions
    assert bool(preempted) == bool(room)
    for one, event, p in zip(asked, found, penalties):
        assert list(event.token_ids) == generated(edited_copy(loaded, one.edit), one.prompt_ids, one.max_tokens, p)
    assert set(found[2].token_ids) == {70}


def test_presence_and_frequency_keep_a_row_from_repeating_itself() -> None:
    loaded = load(seed=5)
    whole = {"n_tokens": 40, "ignore_eos": True}
    with engine_of(loaded) as engine:
        plain, frequent, present = answers(
            engine,
            [
                request(prompt(6), **whole),
                request(prompt(6), **whole, penalties=Penalties(frequency=1000.0)),
                request(prompt(6), **whole, penalties=Penalties(presence=-1000.0)),
            ],
        )
    assert len(set(plain.token_ids)) < 40 == len(set(frequent.token_ids))
    assert len(set(present.token_ids)) == 1 and present.token_ids[0] == plain.token_ids[0]


def test_a_bias_of_a_token_that_there_is_not_is_refused() -> None:
    from serve.errors import InvalidRequest

    with engine_of(load()) as engine, pytest.raises(InvalidRequest, match="logit_bias has a token id") as raised:
        answers(engine, [request(prompt(3), penalties=Penalties(bias=((10_000, 1.0),)))])
    assert raised.value.param == "logit_bias"
