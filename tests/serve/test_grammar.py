"""Answers of a given form: whatever the model would rather say, the text is JSON of the schema."""

import asyncio
import json
import re
import sys

import jsonschema
import pytest

from serve.api.formats import ResponseFormat, grammar_of
from serve.errors import InvalidRequest, RequestError
from tests.support.engine_helpers import answers, edited_copy, engine_of, greedy, load, prompt, request, together

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "dark blue"]},
        "size": {"type": "integer", "minimum": -3, "maximum": 120},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "note": {"type": ["string", "null"], "maxLength": 6},
    },
    "required": ["colour", "size", "parts", "note"],
    "additionalProperties": False,
}


def asked(schema: dict | None) -> ResponseFormat:
    if schema is None:
        return ResponseFormat(type="json_object")
    return ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def grammar(schema: dict | None) -> str:
    pytest.importorskip("llguidance", reason="the extra [grammar] is not installed")
    found = asyncio.run(grammar_of(asked(schema)))
    assert found is not None
    return found


def test_a_random_model_writes_json_of_the_schema() -> None:
    """Under edits and without, greedy and sampled, beside rows that may say anything, and with penalties."""
    loaded = load(seed=2, max_position_embeddings=2048)
    form = grammar(SCHEMA)
    held = [
        request(prompt(5, i), edit, n_tokens=1500, temperature=temperature, seed=i, grammar=form)
        for i, (edit, temperature) in enumerate([(None, 0.0), (None, 1.0), ("0", 1.5), ("3", 0.7), ("6", 2.0)] * 3)
    ]
    free = [request(prompt(5, i), None, n_tokens=30, ignore_eos=True) for i in range(2)]
    with engine_of(loaded) as engine:
        found = together(engine, [*held, *free])
    assert len({event.text for event in found}) > 10
    for event in found[: len(held)]:
        assert event.finish_reason == "stop", event
        jsonschema.validate(json.loads(event.text), SCHEMA)
    for one, event in zip(free, found[len(held) :]):
        expected = greedy(edited_copy(loaded, None), one.prompt_ids, 30, ignore_eos=True)
        assert list(event.token_ids) == expected


def test_any_object_is_an_object_and_a_cut_answer_is_the_beginning_of_one() -> None:
    with engine_of(load(seed=4)) as engine:
        whole = answers(
            engine,
            [request(prompt(4, i), n_tokens=480, temperature=1.0, seed=i, grammar=grammar(None)) for i in range(8)],
        )
        (cut,) = answers(engine, [request(prompt(4), n_tokens=3, grammar=grammar(SCHEMA))])
    ended = [event for event in whole if event.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(event.text), dict) for event in ended)
    assert all(event.text.lstrip().startswith("{") for event in whole)
    assert cut.finish_reason == "length" and cut.n_completion == 3 and cut.text.lstrip()[:1] in ("{", "")


def test_rows_that_go_back_for_lack_of_room_go_on_in_their_form() -> None:
    pytest.importorskip("llguidance", reason="the extra [grammar] is not installed")
    form = "start: /([a-f][0-9]){100}/"
    held = [request(prompt(6, i), n_tokens=450, temperature=1.0, seed=i, grammar=form) for i in range(4)]
    with engine_of(load(seed=2), kv_tokens=500) as engine:
        found = together(engine, held)
        assert engine.stats().preemptions > 0, "there was room for all: the test shows nothing"
    for event in found:
        assert event.finish_reason == "stop" and re.fullmatch("([a-f][0-9]){100}", event.text)


def test_a_schema_that_cannot_be_followed_is_refused_before_the_engine_hears_of_it() -> None:
    pytest.importorskip("llguidance", reason="the extra [grammar] is not installed")
    for schema in ({"type": "nonsense"}, {"$ref": "#/missing"}, {"type": "string", "format": "no-such-format"}):
        with pytest.raises(RequestError, match="The schema cannot be followed") as raised:
            grammar(schema)
        assert raised.value.status == 400 and raised.value.param == "response_format.json_schema.schema"


def test_an_engine_refuses_a_form_that_it_cannot_follow_and_goes_on() -> None:
    pytest.importorskip("llguidance", reason="the extra [grammar] is not installed")
    with engine_of(load()) as engine:
        with pytest.raises(InvalidRequest, match="form cannot be followed") as raised:
            answers(engine, [request(prompt(3), grammar="start: missing_rule")])
        assert raised.value.param == "response_format"
        (event,) = answers(engine, [request(prompt(3), n_tokens=2, ignore_eos=True)])
    assert event.n_completion == 2


def test_without_llguidance_a_json_format_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install bruno-ray\[grammar\]") as raised:
        asyncio.run(grammar_of(asked({"type": "object", "title": "never asked for before"})))
    assert (raised.value.status, raised.value.param) == (400, "response_format")
    assert asyncio.run(grammar_of(ResponseFormat(type="text"))) is None
