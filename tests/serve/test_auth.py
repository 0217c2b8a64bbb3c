"""Keys: who gets in, and that no key is ever written anywhere."""

import hashlib

import httpx
import pytest

from bruno_ray.errors import SettingsError
from serve import command
from serve.api.auth import Keys, hash_of, known_hashes, make_key
from serve.arguments import is_loopback
from tests.support.waiting import wait_for

KEY = "a-good-key-0123456789"


# ----- without a server -----


def test_keys_come_from_a_file_of_hashes_and_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    sha256sum = hashlib.sha256(KEY.encode()).hexdigest()
    file.write_text(f"# of the team\n\n{sha256sum}  -\nsha256:{hash_of('another')} bob\n")
    hashes = known_hashes(file, {"BRUNO_API_KEY": "from-the-environment"})
    keys = Keys(hashes)
    for key in (KEY, "another", "from-the-environment"):
        assert keys.accept(key) and keys.accept_header(f"Bearer {key}") and keys.accept_header(f"bearer {key}")
    for header in (None, "", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {sha256sum}", "Bearer ", "Bearer \xff"):
        assert not keys.accept_header(header)
    assert not Keys(()).accept("")


def test_a_key_in_the_place_of_its_hash_is_refused_without_being_shown(tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEY)
    with pytest.raises(SettingsError, match="line 1") as raised:
        known_hashes(file, {})
    assert KEY not in str(raised.value)


def test_bad_sources_of_keys_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot read"):
        known_hashes(tmp_path / "nothing", {})
    with pytest.raises(SettingsError, match="too short"):
        known_hashes(None, {"BRUNO_API_KEY": "guess-me"})


def test_made_keys_are_long_and_differ():
    assert len({make_key() for _ in range(100)}) == 100
    assert len(make_key()) > 40


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True),
                                            ("localhost", True), ("0.0.0.0", False), ("::", False),
                                            ("10.1.2.3", False), ("my-host", False)])  # fmt: skip
def test_only_loopback_goes_without_a_key(host, loopback):
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to serve"),
        (["nothing"], "nothing of this can be served"),
        (["x", "--port", "0"], "--port"),
        (["x", "--replicas", "3", "--max-replicas", "2"], "--max-replicas"),
        (["x", "--route-prefix", "no-slash"], "--route-prefix"),
        (["x", "--no-key", "--keys-file", "f"], "cannot read keys_file"),
    ],
)
def test_command_refuses_what_makes_no_sense_in_one_line(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    *_, last = said.splitlines()
    assert last.startswith("error: ") and reason in last
    assert "Traceback" not in said


# ----- with one -----


@pytest.mark.ray
@pytest.mark.slow
def test_everything_but_health_needs_the_key(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        paths = client.get("/openapi.json", headers=server.headers).json()["paths"]
        assert len(paths) > 10
        for path, methods in paths.items():
            for method in methods:
                if path == "/ready":  # gives an engine 2 s to answer
                    wait_for(lambda: client.get("/ready").status_code == 200, "the server is ready")
                answer = client.request(method, path.replace("{id}", server.base))
                is_open = path in ("/health", "/ready")
                assert answer.status_code == (200 if is_open else 401), path
                if not is_open:
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/openapi.json", "/docs", "/", "/api/", "/nothing"):
            assert client.get(path).status_code == 401, path
        for header in ("Bearer wrong", "Basic x", f"Bearer {server.key}x", "Bearer"):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 401
        assert client.get(f"/v1/models?api_key={'x' * 20}").status_code == 401


@pytest.mark.ray
@pytest.mark.slow
def test_no_log_holds_a_key(server):
    wrong = "a-wrong-key-that-must-not-be-logged"
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for key in (server.key, wrong):
            headers = {"Authorization": f"Bearer {key}"}
            client.get("/v1/models", headers=headers)
            client.get("/v1/models/nothing", headers=headers)
            client.post("/v1/completions", headers=headers, content=b"{")
            client.post("/v1/completions", headers=headers, json={"model": "nothing", "prompt": "x"})
            client.post("/v1/chat/completions", headers=headers, json={"model": server.base, "messages": [
                {"role": "user", "content": "x"}], "max_tokens": 2})  # fmt: skip
    logs = server.logs()
    assert "bruno-ray_Api" in logs  # that they are read at all
    assert server.key not in logs
    assert wrong not in logs
