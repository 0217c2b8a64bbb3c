"""What the model reads: the chat template, and a limit that spares all but the user's text."""

import datetime
from functools import partial
from typing import Any

import pytest

from bruno_ray.errors import ModelError, PromptError
from bruno_ray.prompts import rendering
from bruno_ray.prompts.rendering import messages
from bruno_ray.prompts.sets import Prompt

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
SILENT = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
HEADER = "<|end|><|assistant|>"
DATE = datetime.date(2024, 2, 29)
render, render_texts = (partial(function, date=DATE) for function in (rendering.render, rendering.render_texts))


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A byte-level BPE tokenizer with merges, trained here on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([LONG, "You are a helpful assistant. Answer briefly."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=special[1:])
    fast.chat_template = template
    return fast


LONG = (
    "Tell me, in your own words, what the quarry of the northern valley is known for, caf\u00e9s included \U0001f600. "
    * 5
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_rendered_text(tokenizer: Any) -> None:
    prompts = [Prompt("Hello", "Be kind."), Prompt("Hi")]
    first, second = render(tokenizer, prompts, response_prefix="Sure,")
    assert decoded(tokenizer, first) == f"<s><|system|>Be kind.<|end|><|user|>Hello{HEADER}Sure,"
    assert decoded(tokenizer, second) == f"<s><|user|>Hi{HEADER}Sure,"
    assert first.count(tokenizer.bos_token_id) == 1
    assert render(tokenizer, []) == []


def test_examples_are_turns_before_the_prompt(tokenizer: Any) -> None:
    examples = [Prompt("Open it.", answer=" It is open. "), Prompt("Ring her.", "Be rude.", answer="I rang her.")]
    (ids,) = render(tokenizer, [Prompt("Hello", "Be kind.")], "Sure,", examples=examples)
    assert decoded(tokenizer, ids) == (
        "<s><|system|>Be kind.<|end|><|user|>Open it.<|end|><|assistant|>It is open.<|end|><|user|>Ring her.<|end|>"
        f"<|assistant|>I rang her.<|end|><|user|>Hello{HEADER}Sure,"
    )
    turns = messages(Prompt("Hello", "Be kind."), True, examples)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[0]["content"] == "Be kind.\n\nOpen it." and turns[-1]["content"] == "Hello"


@pytest.mark.parametrize("kept", ["", " Answer briefly."])
def test_cutting_is_exact_and_spares_everything_else(tokenizer: Any, kept: str) -> None:
    prompt = Prompt(LONG + kept, "You are a helpful assistant.", kept_end=len(kept))
    begin, end = "<s><|system|>You are a helpful assistant.<|end|><|user|>", f"{kept}{HEADER}Sure,"
    cuts = {
        cut: len(render(tokenizer, [Prompt(LONG[:cut] + kept, prompt.system)], "Sure,")[0]) for cut in range(len(LONG))
    }
    ids = None
    for max_tokens in (len(render(tokenizer, [prompt], "Sure,")[0]) - 1, 100, 61, 40):
        (ids,) = render(tokenizer, [prompt], "Sure,", max_tokens)
        text = decoded(tokenizer, ids)
        assert text.startswith(begin) and text.endswith(end)
        users_text = text[len(begin) : -len(end)]
        assert users_text and LONG.startswith(users_text)
        # The longest cut that fits; the template trims a space at the end, so compare tokens.
        longest = max(n for n in cuts.values() if n <= max_tokens)
        assert longest - 1 <= len(ids) <= max_tokens
    assert ids is not None


def test_short_prompts_are_not_touched_by_a_limit(tokenizer: Any) -> None:
    prompts = [Prompt("Hello"), Prompt(LONG)]
    whole = render(tokenizer, prompts)
    assert render(tokenizer, prompts, max_tokens=len(whole[1])) == whole
    assert render(tokenizer, prompts, max_tokens=30)[0] == whole[0]
    assert len(render(tokenizer, prompts, max_tokens=30)[1]) <= 30


def test_no_room_for_any_text(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"max_tokens = 5 leaves no room .* alone take \d+ tokens"):
        render(tokenizer, [Prompt(LONG, "You are a helpful assistant.")], max_tokens=5)


def test_a_tokenizer_without_offsets_is_cut_as_well() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = "U:{{ messages[0].content }};A:"
    (ids,) = render(tokenizer, [Prompt("abc\u00e9" * 50)], max_tokens=20)
    assert tokenizer.decode(ids) == "U:" + ("abc\u00e9" * 50)[:12] + ";A:"  # 12 characters of 15 bytes
    assert len(ids) == 20


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT])
def test_system_text_moves_into_the_users_turn_where_there_is_no_such_role(template: str) -> None:
    tokenizer = make_tokenizer(template)
    (text,) = render_texts(tokenizer, [Prompt("Hello", "Be kind.")])
    assert text == f"<s><|user|>Be kind.\n\nHello{HEADER}"
    (ids,) = render(tokenizer, [Prompt(LONG, "Be kind.")], max_tokens=40)
    assert decoded(tokenizer, ids).startswith("<s><|user|>Be kind.\n\nTell me") and len(ids) <= 40
    assert render_texts(tokenizer, [Prompt("Hello")]) == [f"<s><|user|>Hello{HEADER}"]


def test_not_a_chat_model() -> None:
    with pytest.raises(ModelError, match="not a chat model"):
        render(make_tokenizer(None), [Prompt("Hello")])
    with pytest.raises(ModelError, match=r"chat template of .* fails"):
        render(make_tokenizer("{{ raise_exception('broken') }}"), [Prompt("Hello")])


def test_messages() -> None:
    assert messages(Prompt("Hello", "Be kind.")) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
    ]
    assert messages(Prompt("Hello", "")) == [{"role": "user", "content": "Hello"}]
