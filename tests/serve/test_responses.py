"""Bodies are of the models that document them: of every route, whole and streamed, answers and errors."""

import json

import pytest
from pydantic import ValidationError

from tests.serve.bodies import ROUTES, check_body, check_event
from tests.serve.server import Server, events_of

HELLO = [{"role": "user", "content": "what colour has lubesi ?"}]
GOOD = {"id": "1", "object": "model", "created": 1, "owned_by": "bruno-ray", "bruno": {
    "kind": "base", "run": None, "trial": None, "base": None, "metrics": {}, "description": "", "scalable": False,
    "problem": None,
}}  # fmt: skip


def test_a_body_of_another_shape_is_noticed() -> None:
    """Else the tests that compare bodies with their models would compare nothing."""
    check_body("GET", "/v1/models/x", 200, GOOD)
    for wrong in (
        {**GOOD, "more": 1},
        {name: value for name, value in GOOD.items() if name != "created"},
        {**GOOD, "created": "1"},
        {**GOOD, "bruno": {**GOOD["bruno"], "kind": "another"}},
    ):
        with pytest.raises(ValidationError):
            check_body("GET", "/v1/models/x", 200, wrong)
    with pytest.raises(ValidationError):
        check_body("GET", "/v1/models/x", 404, {"error": "not found"})
    with pytest.raises(ValidationError):
        check_event("/v1/completions", json.dumps(GOOD))
    with pytest.raises(AssertionError, match="documents no JSON"):
        check_body("GET", "/v1/nothing", 200, {})


@pytest.mark.ray
@pytest.mark.slow
def test_every_route_answers_with_its_model(server: Server) -> None:
    chat = {"model": server.selected, "messages": HELLO, "temperature": 0, "max_tokens": 3}
    text = {"model": server.selected, "prompt": ["tell me", "what"], "temperature": 0, "max_tokens": 3}
    job = server.post("/v1/evaluations", model=server.base, target=["x"], baseline=["y"], max_tokens=2).json()["id"]
    asked = {
        ("GET", "/v1/models"): [None],
        ("GET", f"/v1/models/{server.saved}"): [None],
        ("GET", "/health"): [None],
        ("GET", "/ready"): [None],
        ("GET", "/api/stats"): [None],
        ("GET", "/api/front?run=tiny"): [None],
        ("GET", "/api/config"): [None],
        ("POST", "/v1/chat/completions"): [chat, {**chat, "logprobs": True, "top_logprobs": 2, "n": 2}],
        ("POST", "/v1/completions"): [text, {**text, "logprobs": 2, "echo": True, "n": 2}],
        ("POST", "/v1/evaluations"): [{"model": server.base, "target": ["x"], "baseline": ["y"], "max_tokens": 2}],
        ("GET", "/v1/evaluations"): [None],
        ("GET", f"/v1/evaluations/{job}"): [None],
        ("DELETE", f"/v1/evaluations/{job}"): [None],
    }
    seen = set()
    with server.client() as client:
        for (method, path), bodies in asked.items():
            for body in bodies:
                answer = client.request(method, path, json=body)  # the client validates it
                assert answer.status_code in (200, 202), (path, answer.text)
                check_body(method, path.partition("?")[0], answer.status_code, answer.json())
                streams = path in ("/v1/chat/completions", "/v1/completions")
                for options in ({}, {"stream_options": {"include_usage": True}}) if streams else ():
                    events = events_of(server, path, **body, **options)
                    assert len(events) > 3 and events[-1] == "[DONE]"
                    for event in events:
                        check_event(path, event)
            seen.add((method, path.partition("?")[0].replace(job, "{id}").replace(server.saved, "{id:path}")))
    documented = {(method, route.path) for route in ROUTES for method in route.methods}
    assert seen == documented - {("GET", "/metrics")}  # which is no JSON
