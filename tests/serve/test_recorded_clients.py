"""What other people's clients were recorded to send, sent again to the real application.

``clients/recorder.py`` says how it was recorded. The clients themselves run nightly (``test_clients.py``).
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.bodies import check_event
from tests.serve.clients.recorder import NAMES, Sent, models_of, read
from tests.serve.server import Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_client_sends_is_answered_as_it_was(server: Server, name: str) -> None:
    """With the status that the client met, in the shape that is documented, and streamed as whole."""
    recorded = read(name)
    assert len(recorded) > 2
    texts = defaultdict(set)
    for sent in recorded:
        body = with_models(sent.body, server)
        for index, text in enumerate(answered(server, sent, body)):
            if body.get("temperature") == 0:
                asked = {field: value for field, value in body.items() if not field.startswith("stream")}
                texts[sent.path, json.dumps(asked, sort_keys=True), index].add(text)
    assert all(len(said) == 1 for said in texts.values()), texts
    kinds = {bool(sent.body.get("stream")) for sent in recorded if sent.body}
    assert kinds == {True, False} or name in ("lm_eval", "crewai", "team")


def test_a_team_asks_a_model_for_each_role(server: Server) -> None:
    """The example team: the base plans, a trial and the selected one work on the plan, the base has the last word."""
    recorded = read("team")
    assert [sent.body["model"] for sent in recorded] == ["{base}", "{trial}", "{selected}", "{base}"]
    asked = [with_models(sent.body, server) for sent in recorded]
    roles = [body["messages"][0]["content"].split(".")[0] for body in asked]
    assert roles == ["You are P", "You are F", "You are S", "You are P"]
    assert not any("tools" in body for body in asked)
    for sent, body in zip(recorded, asked):
        answer = server.post(sent.path, **body)
        assert answer.status_code == 200
        assert answer.json()["model"] == body["model"]
        assert 1 <= answer.json()["usage"]["completion_tokens"] <= 6


def with_models(body: Any, server: Server) -> dict[str, Any]:
    if body is None:
        return {}
    return {**body, "model": models_of(server).get(body["model"], body["model"])}


def answered(server: Server, sent: Sent, body: dict[str, Any]) -> Iterator[str]:
    """The texts of all choices, by index."""
    content = json.dumps(body).encode() if body else None
    with server.client() as client:  # which holds bodies against their models
        response = client.request(sent.method, sent.path, content=content, headers=sent.headers)
    assert response.status_code == sent.status, response.text
    if response.status_code != 200 or sent.method == "GET":
        return
    if body.get("stream"):
        yield from streamed(sent.path, body, response.text)
        return
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    for choice in choices:
        assert choice["finish_reason"] in ("stop", "length")
        wanted = body.get("logprobs")  # of a completion 0 as well
        assert (choice["logprobs"] is not None) == (wanted is not None and wanted is not False)
        yield choice["text"] if "text" in choice else choice["message"]["content"]


def streamed(path: str, body: dict[str, Any], content: str) -> list[str]:
    *events, end = [event.removeprefix("data: ") for event in content.strip().split("\n\n")]
    assert end == "[DONE]"
    texts: dict[int, str] = defaultdict(str)
    reasons, n_usages = {}, 0
    for event in events:
        check_event(path, event)
        chunk = json.loads(event)
        n_usages += chunk.get("usage") is not None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    assert reasons.keys() == texts.keys()
    assert n_usages == bool((body.get("stream_options") or {}).get("include_usage"))
    return [texts[index] for index in sorted(texts)]
