"""Residuals are those of the last token, alone or in any batch, and nothing else is kept."""

import functools

import pytest
import torch

from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.batching import TokenBudget
from bruno_ray.model.loading import LoadedModel
from bruno_ray.residuals.extraction import extract_residuals, last_position
from tests.support.tiny_models import FAMILIES, HIDDEN, build, build_tokenizer

PROMPTS = [[257, *b"a rather long prompt"], [257, 65], [257, *b"in between"], [257, *b"five5"]]


def load(family: str = "llama", **changes: object) -> LoadedModel:
    model = build(family, **changes)
    return LoadedModel(
        model=model,
        tokenizer=build_tokenizer(),
        processor=None,
        architecture=find_architecture(model),
        dtype="float32",
        fingerprint="tiny",
        device=torch.device("cpu"),
        generation_config=model.generation_config,
    )


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return load()


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_or_in_a_batch_every_family_gives_the_same_residuals(family):
    loaded = load(family)
    together = extract_residuals(loaded, PROMPTS, batch_tokens=10_000)
    assert together.shape == (len(PROMPTS), 1, loaded.architecture.n_layers + 1, HIDDEN)
    for index, prompt in enumerate(PROMPTS):
        alone = extract_residuals(loaded, [prompt])[0]
        torch.testing.assert_close(together[index], alone, atol=2e-4, rtol=1e-4)


BEGINNING = [257, *b"what all of them begin with: "]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_common_beginning_is_read_once_and_changes_nothing(family):
    """Wherever a mask hides the padding behind it; of one prompt alone nothing is common."""
    loaded = load(family)
    prompts = [BEGINNING + prompt[1:] for prompt in PROMPTS]
    together = extract_residuals(loaded, prompts, batch_tokens=80)
    for index, prompt in enumerate(prompts):
        alone = extract_residuals(loaded, [prompt])[0]
        torch.testing.assert_close(together[index], alone, atol=2e-4, rtol=1e-4)


def test_a_common_beginning_spares_its_tokens(llama, monkeypatch):
    forward, tokens = llama.model.model.forward, []

    @functools.wraps(forward)
    def counted(**given):
        tokens.append(given["input_ids"].numel())
        return forward(**given)

    monkeypatch.setattr(llama.model.model, "forward", counted)
    extract_residuals(llama, [[*BEGINNING, letter] for letter in b"abcdefgh"])
    assert tokens == [len(BEGINNING), 8]
    tokens.clear()
    extract_residuals(llama, [BEGINNING] * 8)
    assert tokens == [len(BEGINNING) - 1, 8], "the last token is read of every prompt"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gemma3", "qwen3_5_moe"])
def test_points_are_the_models_own_hidden_states_except_that_the_last_is_before_the_norm(family):
    loaded = load(family)
    prompt = PROMPTS[0]
    residuals_LD = extract_residuals(loaded, [prompt])[0, 0]
    with torch.no_grad():
        states = loaded.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected = torch.stack([state[0, -1] for state in states])
        normed = loaded.architecture.final_norm(residuals_LD[-1])
    torch.testing.assert_close(residuals_LD[:-1], expected[:-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed, expected[-1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(residuals_LD[-1], expected[-1], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_5_text"])
def test_answer_positions_are_those_of_the_greedy_answer_fed_as_a_prompt(family):
    loaded = load(family)
    answer_tokens = 3
    found = extract_residuals(loaded, PROMPTS, answer_tokens)
    assert found.shape[1] == 1 + answer_tokens
    for prompt, residuals_PLD in zip(PROMPTS, found):
        tokens = list(prompt)
        for position in range(1 + answer_tokens):
            torch.testing.assert_close(
                residuals_PLD[position], extract_residuals(loaded, [tokens])[0, 0], atol=2e-4, rtol=1e-4
            )
            with torch.no_grad():
                token = loaded.model(torch.tensor([tokens])).logits[0, -1].argmax().item()
            assert token not in loaded.eos_token_ids
            tokens.append(token)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text"])
def test_behind_an_opening_positions_are_those_of_the_prompt_that_ends_in_it(family):
    """The opening's own tokens first, then the greedy answer that follows it."""
    loaded = load(family)
    opening = list(b"the")
    found = extract_residuals(loaded, PROMPTS, 5, opening=opening)
    for prompt, residuals_PLD in zip(PROMPTS, found):
        for n in range(4):
            read = extract_residuals(loaded, [[*prompt, *opening[:n]]])[0, 0]
            torch.testing.assert_close(residuals_PLD[n], read, atol=2e-4, rtol=1e-4)
        rest = extract_residuals(loaded, [[*prompt, *opening]], 2)[0]
        torch.testing.assert_close(residuals_PLD[3:], rest, atol=2e-4, rtol=1e-4)


def test_after_the_end_of_an_answer_the_last_position_is_repeated(llama):
    free = extract_residuals(llama, PROMPTS, answer_tokens=3)
    with torch.no_grad():
        first = llama.model(torch.tensor([PROMPTS[2]])).logits[0, -1].argmax().item()
    ending = load()
    ending.generation_config.eos_token_id = first  # now the answer to prompt 2 ends before it has begun
    found = extract_residuals(ending, PROMPTS, answer_tokens=3)
    torch.testing.assert_close(found[2], found[2, :1].expand(4, -1, -1))
    torch.testing.assert_close(found[2, 0], free[2, 0])
    alone = extract_residuals(ending, [PROMPTS[2]], answer_tokens=3)  # the whole batch has ended
    torch.testing.assert_close(alone[0], found[2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0, 0], found[0, 1], atol=1e-2)


def test_the_order_of_prompts_and_the_budget_change_nothing(llama):
    whole = extract_residuals(llama, PROMPTS, batch_tokens=10_000)
    order = [2, 0, 3, 1]
    done = []
    pieces = extract_residuals(
        llama, [PROMPTS[i] for i in order], batch_tokens=25, on_batch=lambda n, total: done.append((n, total))
    )
    torch.testing.assert_close(pieces, whole[order], atol=1e-4, rtol=1e-4)
    assert done == [(1, 4), (3, 4), (4, 4)]  # 21 tokens; 11 + 6 padded to 22; 2


def test_hooks_keep_one_position_and_are_removed(llama):
    """Memory of a batch is layers x rows x d_model, whatever the length."""
    rows, length = 3, 200
    tokens = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), last_position(llama.architecture.layers) as record:
        llama.model.base_model(tokens, use_cache=False)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in record.kept_L)
    assert kept == (llama.architecture.n_layers + 1) * rows * HIDDEN * 4
    assert record.take().shape == (rows, llama.architecture.n_layers + 1, HIDDEN)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in llama.architecture.layers)


def test_no_logits_are_computed_for_prompt_positions(llama, monkeypatch):
    def refuse(*_args: object) -> None:
        raise AssertionError("the language-model head ran")

    monkeypatch.setattr(llama.model.lm_head, "forward", refuse)
    assert torch.isfinite(extract_residuals(llama, PROMPTS)).all()
    shapes = []
    monkeypatch.setattr(
        llama.model.lm_head, "forward", lambda hidden: shapes.append(hidden.shape) or torch.zeros(*hidden.shape[:2], 9)
    )
    extract_residuals(llama, PROMPTS, answer_tokens=1)
    assert shapes and all(shape[1] == 1 for shape in shapes)


def test_half_precision_models_give_float32_residuals():
    loaded = load(dtype=torch.bfloat16)
    residuals = extract_residuals(loaded, PROMPTS)
    assert residuals.dtype == torch.float32
    assert torch.equal(residuals, residuals.bfloat16().float())  # widened, not recomputed


def test_a_lack_of_memory_halves_the_batch_and_the_result_is_the_same(llama, monkeypatch):
    whole = extract_residuals(llama, PROMPTS)
    body = llama.model.base_model
    forward = body.forward

    @functools.wraps(forward)
    def small(input_ids: torch.Tensor, **kwargs: object) -> object:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(body, "forward", small)
    budget = TokenBudget(100)
    torch.testing.assert_close(extract_residuals(llama, PROMPTS, batch_tokens=budget), whole, atol=1e-4, rtol=1e-4)
    assert budget.tokens < 100


def test_a_residual_that_is_not_a_number_names_its_prompt_and_layer():
    loaded = load()
    embedding = loaded.architecture.embedding.weight
    with torch.no_grad():
        loaded.architecture.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"prompt 0 are not finite in the output of layer 1 at its last token"):
        extract_residuals(loaded, PROMPTS)
    with torch.no_grad():
        loaded.architecture.layers[1].mlp.down_proj.weight[0, 0] = 0
        embedding[ord("5")] = float("inf")  # the last token of the last prompt only
    with pytest.raises(ModelError, match=r"prompt 3 are not finite in the embedding output"):
        extract_residuals(loaded, PROMPTS)


def test_no_prompts_no_residuals(llama):
    assert extract_residuals(llama, []).shape == (0, 1, llama.architecture.n_layers + 1, HIDDEN)
