"""What clients send that OpenAI's API does not have, or that does nothing here; and how wrong requests are explained.

The application without a model: a request that is accepted gets as far as not finding one (404).
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.api.auth import Keys, hash_of
from serve.api.ingress import build
from serve.api.left_alone import OFF
from serve.api.service import Service
from serve.catalog.catalog import Catalog
from serve.deployment.engine_clients import EngineClients
from serve.metrics import Metrics
from serve.settings import ServeArgs

HELLO = {"role": "user", "content": "Hello"}
CHAT = {"model": "m", "messages": [HELLO]}
TEXT = {"model": "m", "prompt": "Hello"}
LOCAL = "http://localhost:3000"
KEY = "a-good-key-0123456789"


def app(keys: Keys | None = None, **args: Any) -> TestClient:
    settings = ServeArgs(pages=False, require_key=keys is not None, **args)
    metrics = Metrics()
    service = Service(settings, Catalog(), EngineClients({}, Catalog(), metrics, 1.0, 1), metrics)
    return TestClient(build(service, keys, None), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with app() as client:
        yield client


def told(client: TestClient, path: str, body: dict[str, Any]) -> tuple[int, str | None, str]:
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["message"]


def message_with(**fields: Any) -> dict[str, Any]:
    return {"messages": [{**HELLO, **fields}]}


# ----- what is read and left alone -----

PART = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
HARMLESS = [
    message_with(id="m-1"),  # CodeCompanion
    message_with(opts={"visible": True}),
    message_with(cache_control={"type": "ephemeral"}),
    message_with(content=[PART]),  # aider, litellm
    {"messages": [HELLO, {"role": "assistant", "content": "Hi", "reasoning_content": ""}, HELLO]},  # avante.nvim
    {"messages": [HELLO, {"role": "assistant", "content": "Hi", "reasoning_content": "They greet."}, HELLO]},
    {"messages": [HELLO, {"role": "assistant", "content": "", "reasoning_details": [{"type": "x"}]}, HELLO]},
    {"reasoning_effort": "low"},
    {"verbosity": "high"},
    {"prediction": {"type": "content", "content": "Hello"}},
    {"top_k": 0, "min_p": 0, "repetition_penalty": 1},  # SillyTavern, Open WebUI
    {"top_k": -1, "typical_p": 1.0, "top_a": 0, "mirostat": 0, "no_repeat_ngram_size": 0, "skip_special_tokens": True},
    {"max_tokens": -1},  # LM Studio
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"store": False, "metadata": {"a": 1}, "user": "me", "service_tier": "auto", "safety_identifier": "x"},
    {"cache_prompt": True, "keep_alive": "5m"},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_fields_that_do_not_change_the_text_are_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert told(client, "/v1/chat/completions", {**CHAT, **fields})[:2] == (404, "model")
    if "messages" not in fields:
        assert told(client, "/v1/completions", {**TEXT, **fields})[:2] == (404, "model")


@pytest.mark.parametrize("name", OFF)
def test_a_sampler_that_is_not_here_is_let_in_where_it_is_off_and_refused_by_name_where_it_is_on(
    client: TestClient, name: str
) -> None:
    off = OFF[name][0]
    assert told(client, "/v1/chat/completions", {**CHAT, name: off})[0] == 404
    assert told(client, "/v1/chat/completions", {**CHAT, name: None})[0] == 404
    for on in (2.5, "on", [1]):
        status, param, text = told(client, "/v1/chat/completions", {**CHAT, name: on})
        assert (status, param) == (400, name) and f"{name} is not supported" in text


@pytest.mark.parametrize(
    "fields",
    [{"enable_thinking": False}, {"temprature": 1}, message_with(mood="good"), {"stream_options": {"every": 1}}],
)
def test_a_field_that_nobody_knows_is_refused_by_name(client: TestClient, fields: dict[str, Any]) -> None:
    stream = {"stream": True} if "stream_options" in fields else {}
    status, param, text = told(client, "/v1/chat/completions", {**CHAT, **stream, **fields})
    assert status == 400 and text == f"Unknown field {param!r}."


# ----- what is done -----


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("top_k", [0, -1, 40, 100_000], [-2, 1.5, "40"]),
        ("min_p", [0, 0.05, 1], [-0.1, 1.1]),
        ("presence_penalty", [-2, 0.5, 2], [2.1, "1"]),
        ("frequency_penalty", [-2, 0.5, 2], [-2.1]),
        ("repetition_penalty", [0.5, 1.3], [0, -1, 11]),
        ("logit_bias", [{}, {"5": 10}, {"5": -100, "70": 0.5}], [{"5": 101}, {"a": 1}, {"-5": 1}, [5]]),
        ("max_tokens", [1, -1], [-2, 1.5, "5"]),
    ],
)
def test_samplers_take_what_they_can_do(client: TestClient, name: str, good: list, bad: list) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        for value in good:
            assert told(client, path, {**body, name: value})[0] == 404, value
        for value in bad:
            status, param, _ = told(client, path, {**body, name: value})
            assert status == 400 and param is not None and param.split(".")[0] == name, (value, param)


# ----- how what is wrong is explained -----


@pytest.mark.parametrize(
    ("path", "fields", "param", "text"),
    [
        ("chat", message_with(content=[]), "messages.0.content", "number of entries must be at least 1, not 0"),
        ("chat", message_with(content=5), "messages.0.content", "should be a valid string, or a valid list"),
        ("chat", message_with(content=["a"]), "messages.0.content.0", "should be a valid dictionary"),
        ("chat", {"messages": []}, "messages", "number of entries must be at least 1, not 0"),
        ("chat", {"messages": "Hello"}, "messages", "should be a valid list"),
        ("chat", {"stop": ["x"] * 17}, "stop", "number of entries must be at most 16, not 17"),
        ("chat", {"stop": 5}, "stop", "should be a valid string, or a valid list"),
        ("chat", {"stop": ["x", ""]}, "stop.1", "number of characters must be at least 1"),
        ("chat", {"n": 0}, "n", "greater than or equal to 1"),
        ("chat", {"n": "2"}, "n", "should be a valid integer"),
        ("chat", {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (
            "chat",
            {"logit_bias": dict.fromkeys(map(str, range(1025)), 1)},
            "logit_bias",
            "number of entries must be at most 1024",
        ),
        (
            "chat",
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "'text', 'json_object' or 'json_schema'",
        ),
        ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "comes with type"),
        ("text", {"prompt": []}, "prompt", "number of entries must be at least 1, not 0"),
        ("text", {"prompt": {}}, "prompt", "should be a valid string, or a valid list"),
        ("text", {"prompt": [[]]}, "prompt.0", "number of entries must be at least 1, not 0"),
        ("text", {"prompt": [3, -5]}, "prompt.1", "greater than or equal to 0"),
        ("text", {"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        ("text", {"stop": [str(i) for i in range(20)]}, "stop", "number of entries must be at most 16, not 20"),
    ],
    ids=str,
)
def test_an_error_is_about_the_right_thing(
    client: TestClient, path: str, fields: dict[str, Any], param: str, text: str
) -> None:
    where, body = {"chat": ("/v1/chat/completions", CHAT), "text": ("/v1/completions", TEXT)}[path]
    status, found, said = told(client, where, {**body, **fields})
    assert (status, found) == (400, param), said
    assert text in said


def test_every_error_has_openais_shape(client: TestClient) -> None:
    preflight = {"Origin": "https://elsewhere.example.org", "Access-Control-Request-Method": "POST"}
    answers = [
        client.get("/nothing"),
        client.post("/v1/embeddings", json={}),
        client.get("/v1/chat/completions"),
        client.options("/v1/chat/completions"),
        client.put("/v1/completions", json={}),
        client.post("/chat/nothing", json={}),
        client.options("/v1/models", headers=preflight),
        client.options("/v1/models", headers={"Origin": LOCAL, "Access-Control-Request-Method": "PATCH"}),
        client.post("/v1/completions", content=b"["),
        client.get("/models/nothing"),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 405, 405, 405, 404, 400, 400, 400, 404]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["message"]


# ----- where it is reached from -----


@pytest.mark.parametrize("root", ["", "/deep/down"])
def test_the_api_is_found_without_v1(root: str) -> None:
    keys = Keys([hash_of(KEY)])
    with TestClient(app(keys).app, root_path=root) as client:
        good = {"Authorization": f"Bearer {KEY}"}
        for path, body in (("/chat/completions", CHAT), ("/completions", TEXT)):
            assert client.post(root + path, json=body).status_code == 401, "a page's path must not open the API"
            answer = client.post(root + path, json=body, headers=good)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert client.get(f"{root}/models").status_code == 401
        assert client.get(f"{root}/models", headers=good).json() == {"object": "list", "data": []}
        assert client.get(f"{root}/models/a/b:c", headers=good).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("setting", "allowed", "refused"),
    [
        (
            None,
            [LOCAL, "http://127.0.0.1", "https://localhost:8443", "http://[::1]:5173"],
            ["https://chat.example.org", "http://localhost.example.org", "http://127.0.0.1.example.org", "null"],
        ),
        (("https://chat.example.org",), ["https://chat.example.org"], [LOCAL, "http://chat.example.org"]),
        (("local", "https://chat.example.org"), [LOCAL, "https://chat.example.org"], ["https://example.org"]),
        (("*",), [LOCAL, "https://anything.example.org"], []),
        ((), [], [LOCAL]),
    ],
    ids=["default", "named", "both", "all", "none"],
)
def test_browsers_are_told_which_pages_may_use_the_api(
    setting: tuple[str, ...] | None, allowed: list[str], refused: list[str]
) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    keys = Keys([hash_of(KEY)])  # which a preflight does not carry
    with app(keys, **({} if setting is None else {"cors_origins": setting})) as client:
        for origin in [*allowed, *refused]:
            may = origin in allowed
            for path in ("/v1/chat/completions", "/chat/completions"):
                preflight = client.options(path, headers={"Origin": origin, **asks})
                assert (preflight.status_code == 200) is may, (origin, preflight.text)
                told = preflight.headers.get("access-control-allow-origin")
                assert told in ((origin, "*") if may else (None,))
                if may:
                    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
                    assert "POST" in preflight.headers["access-control-allow-methods"]
            answer = client.get("/v1/models", headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
            assert answer.status_code == 200  # what a page may read of it is the browser's business
            assert (answer.headers.get("access-control-allow-origin") in (origin, "*")) is may
