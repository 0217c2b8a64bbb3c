"""The engine against transformers' own generate and against plain forward passes, on random models of every family."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.prompt_reads import PromptReads
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.settings import ModelSettings
from tests.support import tiny_models

FAMILIES = sorted(tiny_models.FAMILIES)
LENGTHS = (5, 23, 9, 14, 2, 30, 11)
N = 12
KERNEL = AblationParameters(max_weight=1.0, max_weight_position=2.0, min_weight=0.5, min_weight_distance=2.0)
# Letters end an answer, so that rows leave at different steps.
END_IDS = [258, *range(40)]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]


def load(folder: Path, family: str) -> LoadedModel:
    loaded = load_model(ModelSettings(id=str(tiny_models.write(folder, family)), dtypes=("float32",)))
    loaded.generation_config.eos_token_id = END_IDS
    return loaded


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tmp_path_factory.mktemp("llama"), "llama")


def bank(loaded: LoadedModel, rank: int = 1) -> dict[str, torch.Tensor]:
    shape = (loaded.architecture.n_layers + 1, loaded.architecture.d_model, rank)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return {"random": torch.linalg.qr(directions).Q.transpose(1, 2).contiguous()}


def edits(loaded: LoadedModel) -> list[Edit]:
    """Different strengths, scopes and norm modes."""
    components = loaded.architecture.components
    half = AblationParameters(0.6, 1.0, 0.0, 1.5)
    return [
        Edit(dict.fromkeys(components, KERNEL), "random", None, "full"),
        Edit(dict.fromkeys(components, KERNEL), "random", 1.3, "none"),
        Edit({components[-1]: half}, "random", 0.5, "pre"),
    ]


def by_generate(model: torch.nn.Module, ids: list[int]) -> tuple[tuple[int, ...], bool]:
    """Tokens and whether an end was reached, from transformers, one prompt alone and unpadded."""
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=N,
        do_sample=False,
        eos_token_id=END_IDS,
        pad_token_id=256,
    )[0, len(ids) :].tolist()
    ended = output[-1] in END_IDS
    return tuple(output[:-1] if ended else output), ended


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_transformers_does(family: str, tmp_path: Path) -> None:
    """A padded batch with leaving rows equals generate() on each prompt; logits equal a plain forward pass."""
    loaded = load(tmp_path, family)
    engine = BatchEngine(loaded)
    expected = [by_generate(loaded.model, ids) for ids in prompts()]
    for attempt in ("without drafts", "with drafts"):
        responses = engine.generate(prompts(), [None], N)[0]
        assert [(r.token_ids, r.ended) for r in responses] == expected, attempt
    assert len({len(r.token_ids) for r in responses}) > 2, "the rows should end at different steps"

    with torch.no_grad():
        alone = torch.stack([loaded.model(torch.tensor([ids])).logits[0, -1] for ids in prompts()])
    torch.testing.assert_close(engine.next_logits(prompts(), [None])[0], alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("window", [200, 60])
def test_windows_wide_and_narrow(window: int, tmp_path: Path) -> None:
    """A window that nothing can leave counts as plain attention, with drafts; a narrower one does not."""
    tiny_models.build("gemma3_text", sliding_window=window).save_pretrained(tmp_path)
    tiny_models.build_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelSettings(id=str(tmp_path), dtypes=("float32",)))
    loaded.generation_config.eos_token_id = END_IDS
    engine = BatchEngine(loaded)
    expected = [by_generate(loaded.model, ids) for ids in prompts()]
    for _ in range(2):
        assert [(r.token_ids, r.ended) for r in engine.generate(prompts(), [None], N)[0]] == expected
    assert engine._is_masked(engine._cache(30, N)) == (window == 200)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "qwen3_5_text"])
def test_edits_in_one_batch_as_one_by_one_and_as_baked(family: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, family)
    engine = BatchEngine(loaded)
    resolved = engine.editor.resolve_all(edits(loaded), bank(loaded))
    together = engine.generate(prompts(), [None, *resolved], N)
    logits = engine.next_logits(prompts(), [None, *resolved])
    for k, edit in enumerate([None, *resolved]):
        fresh = BatchEngine(loaded)
        assert fresh.generate(prompts(), [edit], N)[0] == together[k]
        torch.testing.assert_close(fresh.next_logits(prompts(), [edit])[0], logits[k], rtol=2e-3, atol=2e-3)
        fresh.editor.close()
    assert together[0] != together[1], "an edit of strength 1 should change a random model"
    engine.editor.close()
    bake(loaded.architecture, resolved[0])
    assert [(r.token_ids, r.ended) for r in together[1]] == [by_generate(loaded.model, ids) for ids in prompts()]


def test_small_budgets_change_nothing(llama: LoadedModel) -> None:
    whole, cut = BatchEngine(llama), BatchEngine(llama, row_tokens=40)
    resolved = whole.editor.resolve_all(edits(llama), bank(llama))
    assert whole.generate(prompts(), resolved, N) == cut.generate(prompts(), resolved, N)
    torch.testing.assert_close(whole.next_logits(prompts(), resolved), cut.next_logits(prompts(), resolved))


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3", "gemma2", "qwen3_next"])
def test_a_common_beginning_is_read_once_per_edit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache allows it; the numbers are the same everywhere."""
    loaded = load(tmp_path, family)
    engine = BatchEngine(loaded)
    resolved = [None, *engine.editor.resolve_all(edits(loaded), bank(loaded))]
    beginning = prompts()[5]
    ids = [beginning + rest for rest in prompts()]
    tails = [[[7, 8, 9][: 1 + p % 3] for p in range(len(ids))]] * len(resolved)

    def results() -> tuple:
        start = engine.tokens
        answers = engine.generate(ids, resolved, N)
        logits = engine.next_logits(ids, resolved)
        logprobs = engine.token_logprobs(ids, tails, resolved)
        return answers, logits, torch.cat([row for rows in logprobs for row in rows]), engine.tokens - start

    monkeypatch.setattr("bruno_ray.generation.engine.SHARED_TOKENS", 10**9)
    answers, logits, logprobs, tokens = results()
    monkeypatch.setattr("bruno_ray.generation.engine.SHARED_TOKENS", 1)
    fresh = BatchEngine(loaded)
    fresh.editor, engine = engine.editor, fresh
    shared_answers, shared_logits, shared_logprobs, fewer_tokens = results()
    assert shared_answers == answers
    torch.testing.assert_close(shared_logits, logits, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(shared_logprobs, logprobs, rtol=2e-3, atol=2e-3)
    if family in ("llama", "gpt2", "deepseek_v3"):
        assert fewer_tokens < 0.7 * tokens
    else:
        assert fewer_tokens == tokens


def test_running_out_of_memory_halves_the_batch(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = BatchEngine(llama)
    expected = engine.generate(prompts(), [None, None], N)
    forward, refused = BatchEngine._forward, []

    def small_memory(engine: BatchEngine, ids_BJ: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(ids_BJ) > 4:
            refused.append(len(ids_BJ))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(engine, ids_BJ, *rest)

    monkeypatch.setattr(BatchEngine, "_forward", small_memory)
    small = BatchEngine(llama)
    assert small.generate(prompts(), [None, None], N) == expected
    assert refused == [14, 7, 7]


def test_decided_rows_leave_and_history_does_not_matter(llama: LoadedModel) -> None:
    """The answer is cut at the first length at which the verdict is asked for and True, drafted or not."""

    def decide(text: str) -> bool:
        return len(text) >= 6

    full = BatchEngine(llama).generate(prompts(), [None], N)[0]
    fresh, practised = BatchEngine(llama), BatchEngine(llama)
    practised.generate(prompts(), [None], N)
    tokenizer = llama.tokenizer
    for engine in (fresh, practised):
        for whole, response in zip(full, engine.generate(prompts(), [None], N, decide)[0]):
            asked = [n for n in range(1, len(whole.token_ids) + 1) if n <= 4 or n % 4 == 0]
            found = [n for n in asked if decide(tokenizer.decode(whole.token_ids[:n], skip_special_tokens=True))]
            if found:
                assert response.decided and not response.ended
                assert response.token_ids == whole.token_ids[: found[0]]
            else:
                assert response == whole
    assert any(r.decided for r in fresh.generate(prompts(), [None], N, decide)[0])


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A llama in bfloat16, whose answers do not end."""
    folder = tiny_models.write(tmp_path_factory.mktemp("rounded"), "llama")
    return load_model(ModelSettings(id=str(folder), dtypes=("bfloat16",)))


def test_in_bfloat16_logits_are_float32_and_history_does_not_matter(rounded: LoadedModel) -> None:
    """Drafts are confirmed in wider steps, which round otherwise: answers would depend on what was answered before."""
    engine = BatchEngine(rounded)
    logits = engine.next_logits(prompts(), [None])
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        alone = torch.stack([rounded.model(torch.tensor([ids])).logits[0, -1] for ids in prompts()])
    torch.testing.assert_close(logits[0], alone.float(), rtol=0.1, atol=0.1 * float(alone.abs().max()))
    assert engine.generate(prompts(), [None], N) == engine.generate(prompts(), [None], N)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_where_no_answer_can_change_is_anything_drafted(llama: LoadedModel, dtype: str) -> None:
    assert BatchEngine(replace(llama, dtype=dtype)).drafting is (dtype == "float32")


def test_in_bfloat16_edits_together_are_as_near_to_float32_as_each_alone(
    llama: LoadedModel, rounded: LoadedModel
) -> None:
    """K rows and K runs round apart, in batches of other shapes, by no more than either is from the exact logits."""
    exact, engine = BatchEngine(llama), BatchEngine(rounded)
    of_exact = exact.editor.resolve_all(edits(llama), bank(llama))
    of_rounded = engine.editor.resolve_all(edits(rounded), bank(rounded))
    wanted = exact.next_logits(prompts(), of_exact)
    together = engine.next_logits(prompts(), of_rounded)
    alone = torch.cat([engine.next_logits(prompts(), [edit]) for edit in of_rounded])

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).square().mean().sqrt())

    assert distance(together, alone) <= distance(alone, wanted)
    assert distance(together, wanted) <= 1.5 * distance(alone, wanted)
    assert distance(alone, wanted) < 0.05 * float(wanted.abs().max())


def test_drafts_save_forward_passes(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = llama.model.forward, []
    monkeypatch.setattr(llama.model, "forward", lambda **kwargs: calls.append(1) or forward(**kwargs))
    engine = BatchEngine(llama)
    first = engine.generate(prompts(), [None], N)
    without = len(calls)
    assert engine.generate(prompts(), [None], N) == first
    assert len(calls) - without < without / 2


def test_one_broken_edit_leaves_the_others_alone(llama: LoadedModel) -> None:
    engine = BatchEngine(llama)
    broken, good = engine.editor.resolve_all(edits(llama)[:2], bank(llama))
    for factors in broken.factors:
        if factors is not None:
            factors.scale.fill_(float("nan"))
    answers = engine.generate(prompts(), [good, broken, None], N)
    assert answers[0] == engine.generate(prompts(), [good], N)[0]
    assert answers[2] == engine.generate(prompts(), [None], N)[0]
    assert all(not r.finite and r.token_ids == () for r in answers[1])
    assert all(r.finite for r in answers[0])
    logits = engine.next_logits(prompts(), [good, broken])
    assert logits[0].isfinite().all() and not logits[1].isfinite().any()


def test_likelihoods_as_a_plain_forward_pass(llama: LoadedModel) -> None:
    engine = BatchEngine(llama)
    (edit,) = engine.editor.resolve_all(edits(llama)[:1], bank(llama))
    continuations = [
        [list(range(60, 60 + n)) for n in (3, 0, 7, 1, 12, 2, 5)],
        [list(range(90, 90 + n)) for n in (1, 4, 0, 2, 2, 9, 3)],
    ]
    found = engine.token_logprobs(prompts(), continuations, [None, edit])
    for k, applied in enumerate([None, edit]):
        for ids, tail, logprobs in zip(prompts(), continuations[k], found[k]):
            assert len(logprobs) == len(tail)
            if not tail:
                continue
            engine.editor.set([applied], [0])
            with torch.no_grad():
                logits = llama.model(torch.tensor([ids + tail])).logits[0]
            engine.editor.clear()
            expected = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(-1, torch.tensor(tail)[:, None])[:, 0]
            torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_long_and_short_continuations_of_one_prompt(llama: LoadedModel) -> None:
    """What they share is read once; of the longer one no token whose likelihood is asked for is among that."""
    engine = BatchEngine(llama)
    prompt, long = prompts()[0], [*range(60, 60 + 50)]
    tails = [[long, *([*long[:12], 200 + n] for n in range(12))]]
    (found,) = engine.token_logprobs([prompt] * 13, tails, [None])
    for tail, got in zip(tails[0], found):
        ((wanted,),) = engine.token_logprobs([prompt], [[tail]], [None])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("most_bytes", [2**28, 0])
def test_prompts_that_were_answered_are_not_read_again(
    llama: LoadedModel, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likelihoods are those of whole sequences, under every edit, for continuations of any length; without room for
    what was read it is read again."""
    engine = BatchEngine(llama, row_tokens=150)
    resolved = engine.editor.resolve_all(edits(llama), bank(llama))
    generator = torch.Generator().manual_seed(3)
    tails = [
        [torch.randint(0, 256, ((3 * k + p) % 7,), generator=generator).tolist() for p in range(len(LENGTHS))]
        for k in range(4)
    ]
    asked = [None, *resolved]
    wanted = engine.token_logprobs(prompts(), tails, asked)
    reads, fed = PromptReads(most_bytes), []
    answers = engine.generate(prompts(), asked, N, reads=reads)
    assert answers == BatchEngine(llama).generate(prompts(), asked, N)
    forward = BatchEngine._forward
    monkeypatch.setattr(BatchEngine, "_forward", lambda self, ids, *rest: fed.append(ids) or forward(self, ids, *rest))
    found = engine.token_logprobs(prompts(), tails, asked, reads)
    for k in range(len(asked)):
        torch.testing.assert_close(found[k], wanted[k], rtol=1e-4, atol=1e-4)
    assert (sum(ids.numel() for ids in fed) <= 4 * len(LENGTHS) * 6) is bool(most_bytes)


def test_streaming_equals_generating(llama: LoadedModel) -> None:
    engine = BatchEngine(llama)
    (edit,) = engine.editor.resolve_all(edits(llama)[:1], bank(llama))
    for ids, response in zip(prompts(), engine.generate(prompts(), [edit], N)[0]):
        streamed = "".join(engine.stream(ids, edit, N))
        assert streamed == response.text


def spelling(loaded: LoadedModel, tokens: list[int]) -> None:
    """Make the model say ``tokens[1:]`` after ``tokens[0]``: each token's embedding is what its follower listens to."""
    model, head = loaded.model, loaded.model.get_output_embeddings().weight
    vectors = torch.eye(head.shape[1])[: len(tokens)]
    for layer in model.model.layers:  # the stream holds nothing but the embedding
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            for parameter in writer.parameters():
                parameter.zero_()
    model.model.norm.weight.fill_(1.0)
    embeddings = model.get_input_embeddings().weight
    for i, token in enumerate(tokens):
        embeddings[token] = vectors[i]
    head.zero_()
    for before, after in zip(vectors, tokens[1:]):
        head[after] = before


def test_what_is_held_back_of_a_character_comes_at_the_end(tmp_path: Path) -> None:
    """An answer that is cut inside of a character ends as its text does."""
    loaded = load_model(ModelSettings(id=str(tiny_models.write(tmp_path / "cut", "llama")), dtypes=("float32",)))
    start = 200
    with torch.no_grad():
        spelling(loaded, [start, *loaded.tokenizer("caf\u00e9", add_special_tokens=False)["input_ids"]])
    engine = BatchEngine(loaded)
    pieces = list(engine.stream([start], None, 4))
    assert pieces == ["c", "a", "f", "\ufffd"]
    assert "".join(pieces) == engine.generate([[start]], [None], 4)[0][0].text
    assert list(engine.stream([start], None, 5)) == ["c", "a", "f", "\u00e9"]


def test_nucleus_sampling_stays_in_the_nucleus(llama: LoadedModel) -> None:
    engine = BatchEngine(llama)
    ids = prompts()[0]
    best = engine.next_logits([ids], [None])[0, 0].argmax()
    torch.manual_seed(0)
    greedy = next(engine.stream(ids, None, 1), "")
    assert next(engine.stream(ids, None, 1, temperature=5.0, top_p=1e-6), "") == greedy
    assert llama.tokenizer.decode([int(best)]).startswith(greedy)
    drawn = {next(engine.stream(ids, None, 1, temperature=5.0), "") for _ in range(20)}
    assert len(drawn) > 1
