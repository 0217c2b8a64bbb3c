"""Tools reach the prompt in the model's own words, and its calls come back as OpenAI's."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from bruno_ray.generation.text_stream import Decoder, TextStream
from bruno_ray.settings import ModelSettings
from serve.api.rendering import Renderer
from serve.api.requests import ChatRequest, Message
from serve.api.tool_calls import HERMES, LLAMA, MISTRAL, AnswerReader, Call, ToolFormat, tool_format_of
from serve.errors import RequestError
from tests.support import tiny_models
from tests.support.tool_templates import TEMPLATES

DAY = datetime.date(2024, 2, 29)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}

FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}


def renderer(folder: Path, template: str) -> Renderer:
    tiny_models.build("llama").config.save_pretrained(folder)
    tiny_models.build_tokenizer(template).save_pretrained(folder)
    return Renderer(ModelSettings(id=str(folder)))


def asked(messages: list[dict[str, Any]], *tools: dict[str, Any], **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": messages, "tools": list(tools), **fields})


def rendered(one: Renderer, request: ChatRequest) -> str:
    return one.chat_text(request.messages, None, DAY, request.offered)


# ----- to the model -----


@pytest.mark.parametrize("family", TEMPLATES)
def test_tools_calls_and_results_are_rendered_by_the_models_own_template(tmp_path: Path, family: str) -> None:
    """As transformers renders them: arguments as an object, results with the name of their function."""
    one = renderer(tmp_path / family, TEMPLATES[family])
    assert one.tool_format is FORMATS[family]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "user", "content": "How is it in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "22 degrees"},
    ]
    text = rendered(one, asked(turns, WEATHER, CLOCK))
    key = "parameters" if family == "llama" else "arguments"
    assert f'{{"name": "get_weather", "{key}": {{"city": "Rome"}}' in text
    assert "22 degrees" in text and "Weather in a city" in text and "get_time" in text
    if family == "hermes":
        assert "(get_weather)" in text
    if family == "mistral":
        assert "<abcdefghi>" in text
    as_dicts = [turns[0], {"role": "assistant", "content": "", "tool_calls": [{**call, "function": {
        "name": "get_weather", "arguments": {"city": "Rome"}}}]}, {**turns[2], "name": "get_weather"}]  # fmt: skip
    described = [tool.for_template() for tool in asked(turns, WEATHER, CLOCK).offered]
    assert text == one.tokenizer.apply_chat_template(
        as_dicts, tools=described, tokenize=False, add_generation_prompt=True
    )


def test_without_tools_or_with_tool_choice_none_the_prompt_is_as_before(tmp_path: Path) -> None:
    one = renderer(tmp_path / "m", TEMPLATES["hermes"])
    hello = [{"role": "user", "content": "Hello"}]
    plain = rendered(one, asked(hello))
    assert rendered(one, asked(hello, WEATHER, tool_choice="none")) == plain != rendered(one, asked(hello, WEATHER))
    assert "tools" not in plain


@pytest.mark.parametrize(
    "template",
    [
        tiny_models.CHAT_TEMPLATE,
        TEMPLATES["hermes"].replace('{"name"', '<function={"name"'),  # Qwen 3 Coder's XML
        TEMPLATES["mistral"].replace("[TOOL_CALLS]", "[TOOL_CALLS][ARGS]"),  # Mistral since 2025
    ],
    ids=["none", "xml", "args"],
)
def test_where_the_form_is_not_known_tools_are_refused_by_name(tmp_path: Path, template: str) -> None:
    one = renderer(tmp_path / "m", template)
    assert one.tool_format is None
    hello = {"role": "user", "content": "Hello"}
    with pytest.raises(RequestError, match="has no tools, or writes calls in a form that is not known") as raised:
        rendered(one, asked([hello], WEATHER))
    assert (raised.value.status, raised.value.param) == (400, "tools")
    with pytest.raises(RequestError) as raised:
        rendered(one, asked([hello, {"role": "tool", "tool_call_id": "x", "content": "y"}]))
    assert (raised.value.status, raised.value.param) == (400, "messages")
    assert "Hello" in rendered(one, asked([hello], WEATHER, tool_choice="none"))


def test_a_template_that_leaves_a_tool_out_is_told(tmp_path: Path) -> None:
    only_first = TEMPLATES["hermes"].replace("for t in tools", "for t in tools[:1]")
    with pytest.raises(RequestError, match="leaves out the tool 'get_time'"):
        rendered(renderer(tmp_path / "m", only_first), asked([{"role": "user", "content": "Hi"}], WEATHER, CLOCK))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant"},
        {"role": "tool", "content": "x"},
        {"role": "tool", "tool_call_id": "a"},
    ],
    ids=str,
)
def test_messages_that_make_no_sense_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tool_calls|arguments|content|tool_call_id|says which"):
        Message.model_validate(message)


# ----- from the model -----

ROME = Call("get_weather", {"city": "Rome"})
NOW = Call("get_time", {})
ANSWERS: list[tuple[ToolFormat, str, str, list[Call]]] = [
    # As the families' templates teach them.
    (HERMES, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", [ROME]),
    (HERMES, 'Let me see.\n<tool_call>\n{"arguments": {"city": "Rome"}, "name": "get_weather"}\n</tool_call>\n'
             '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>', "Let me see.\n", [ROME, NOW]),
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [ROME]),
    (LLAMA, '\n{"name": "get_weather", "parameters": {"city": "Rome"}}; {"name": "get_time", "parameters": {}}', "",
     [ROME, NOW]),
    (MISTRAL, '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}}]', "", [ROME]),
    (MISTRAL, 'Yes. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "get_time", '
              '"arguments": {}}]', "Yes. ", [ROME, NOW]),
    # No calls: all of it is text.
    (HERMES, "It is warm in Rome, <b>really</b>.", "It is warm in Rome, <b>really</b>.", []),
    (HERMES, '<tool_call>{"name": "get_time", "arguments": ', '<tool_call>{"name": "get_time", "arguments": ', []),
    (HERMES, '<tool_call>{"name": "made_up", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "made_up", "arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "get_time", "arguments": "now"}</tool_call>',
     '<tool_call>{"name": "get_time", "arguments": "now"}</tool_call>', []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, 'As JSON: {"name": "get_time", "parameters": {}}', 'As JSON: {"name": "get_time", "parameters": {}}', []),
    (LLAMA, '{"name": "get_time", "parameters": {}} is what I call.',
     '{"name": "get_time", "parameters": {}} is what I call.', []),
    (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (MISTRAL, "[1, 2]", "[1, 2]", []),
    (LLAMA, "", "", []),
    (HERMES, "a < b", "a < b", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_found_in_whatever_pieces_an_answer_comes(
    form: ToolFormat, answer: str, text: str, calls: list[Call], size: int
) -> None:
    reader = AnswerReader(form, ["get_weather", "get_time"])
    shown = [reader.push(answer[at : at + size]) for at in range(0, len(answer), size)]
    rest, found = reader.finish(True)
    assert found == calls
    assert "".join(shown) + rest == text
    if not calls and not form.marker and answer[:1] != "{":
        assert rest == ""  # nothing was held back that was clear


def test_one_call_only_and_none_in_an_answer_that_was_cut() -> None:
    _, answer, text, calls = ANSWERS[1]
    one = AnswerReader(HERMES, ["get_weather", "get_time"], parallel=False)
    assert one.push(answer) == text and one.finish(True) == ("", calls[:1])
    cut = AnswerReader(HERMES, ["get_weather", "get_time"])
    assert cut.push(answer) + cut.finish(False)[0] == answer
    unoffered = AnswerReader(None, [])
    assert unoffered.push(answer) == answer and unoffered.finish(True) == ("", [])


def test_a_call_is_given_out_as_openai_has_it() -> None:
    made = [Call("f", {"city": "K\u00f6ln"}).as_json() for _ in range(50)]
    assert made[0]["type"] == "function" and made[0]["function"]["name"] == "f"
    assert json.loads(made[0]["function"]["arguments"]) == {"city": "K\u00f6ln"}
    ids = {call["id"] for call in made}
    assert len(ids) == 50 and all(len(one) == 9 and one.isalnum() for one in ids)  # which Mistral's template asks for


def test_a_marker_that_is_a_special_token_is_shown(tmp_path: Path) -> None:
    """Mistral's is; answers would not show it otherwise."""
    tokenizer = tiny_models.build_tokenizer(TEMPLATES["mistral"])
    tokenizer.add_special_tokens({"additional_special_tokens": [MISTRAL.marker]})
    tokenizer.save_pretrained(tmp_path)
    tiny_models.build("llama").config.save_pretrained(tmp_path)
    one = Renderer(ModelSettings(id=str(tmp_path)))
    (shown,) = one.shown_in(MISTRAL)
    assert shown == (tokenizer.convert_tokens_to_ids(MISTRAL.marker), MISTRAL.marker)
    assert one.shown_in(LLAMA) == one.shown_in(HERMES) == ()
    answer = 'Well \u20ac [TOOL_CALLS][{"name": "get_time", "arguments": {}}]<|end|>'
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert shown[0] in ids
    stream, hidden = TextStream(Decoder(tokenizer), shown=dict([shown])), TextStream(Decoder(tokenizer))
    text = "".join(map(stream.push, ids)) + stream.finish()
    assert text == answer.removesuffix("<|end|>")
    assert "".join(map(hidden.push, ids)) + hidden.finish() == text.replace(MISTRAL.marker, "")
    assert tool_format_of(TEMPLATES["mistral"]) is MISTRAL
