"""Starting Ray on this machine wherever that is, finding a cluster, and what is known of one before it has grown."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
import yaml

from bruno_ray.errors import BrunoError, SettingsError, WorkerError
from bruno_ray.settings import RaySettings
from bruno_ray.workers import starting
from bruno_ray.workers.joining import require_cluster
from bruno_ray.workers.session import autoscaler_has_gpus
from bruno_ray.workers.starting import STARTS, local_options, start_local


@pytest.mark.parametrize(
    ("failures", "message", "expected", "tries"),
    [
        (STARTS - 1, "The current node timed out during startup.", None, STARTS),
        (STARTS, "The current node timed out during startup.", WorkerError, STARTS),
        (STARTS - 1, "System error: Failed to connect to GCS.", None, STARTS),
        (STARTS, "System error: Failed to connect to GCS.", WorkerError, STARTS),
        (1, "no room for sockets", WorkerError, 1),
        (1, "the object store is larger than the memory", SettingsError, 1),
    ],
)
def test_ray_gets_more_time_on_a_busy_machine_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, failures: int, message: str, expected: type[Exception] | None, tries: int
) -> None:
    calls = []

    def init(**options):
        calls.append(options)
        if len(calls) <= failures:
            kind = {"The": Exception, "System": Exception, "no": OSError, "the": ValueError}[message.partition(" ")[0]]
            raise kind(message)

    monkeypatch.setattr(ray, "init", init)
    if expected is None:
        start_local(num_cpus=1)
    else:
        with pytest.raises(expected) as caught:
            start_local(num_cpus=1)
        assert isinstance(caught.value, BrunoError) and "\n" not in str(caught.value)
    assert calls == [{"address": "local", "num_cpus": 1}] * tries


def test_gpus_that_the_autoscaler_may_add_are_seen_in_its_configuration(tmp_path: Path) -> None:
    config = tmp_path / "ray_bootstrap_config.yaml"
    assert not autoscaler_has_gpus(config)
    for gpus, most, expected in ((1, 2, True), (0, 2, False), (1, 0, False)):
        workers = {"resources": {"CPU": 8, "GPU": gpus}, "max_workers": most}
        head = {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 0}
        types = {"head": head, "workers": workers}
        config.write_text(yaml.safe_dump({"head_node_type": "head", "available_node_types": types}))
        assert autoscaler_has_gpus(config) is expected


# ----- a cluster that is to be joined -----


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("named_by", ["ray.address", "RAY_ADDRESS"])
@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:{port}", "no Ray cluster at 127.0.0.1:{port} (Connection refused): check {name}"),
        ("ray://127.0.0.1:{port}", "no Ray cluster at ray://127.0.0.1:{port} (Connection refused)"),
        ("[::1]:{port}", "no Ray cluster at [::1]:{port} ("),
        ("no-such-host.invalid:6379", "no Ray cluster at no-such-host.invalid:6379 ("),
        ("127.0.0.1:99999", "no Ray cluster at 127.0.0.1:99999 ("),
        (
            "http://127.0.0.1:8265",
            "{name} = http://127.0.0.1:8265 is the address of Ray's job server or dashboard: give",
        ),
        ("127.0.0.1", "{name} = 127.0.0.1 is no address: give HOST:PORT of the cluster's head"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_before_ray_looks_for_it(
    named_by: str, address: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself goes on looking for more than six minutes."""
    port = closed_port()
    address = address.format(port=port)
    monkeypatch.setenv("RAY_ADDRESS", address if named_by == "RAY_ADDRESS" else "")
    with pytest.raises(SettingsError) as caught:
        require_cluster(RaySettings(address=address if named_by == "ray.address" else None))
    assert str(caught.value).startswith(expected.format(port=port, name=named_by))
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(":")


def test_what_listens_there_must_be_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bruno_ray.workers.joining.ANSWER_S", 0.5)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for port in (server.server_port, silent.getsockname()[1]):
            with pytest.raises(SettingsError, match=f"no Ray cluster at 127.0.0.1:{port} .something else listens"):
                require_cluster(RaySettings(address=f"127.0.0.1:{port}"))
        server.shutdown()


# ----- a machine that is not as Ray expects it -----


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token, and nothing set."""
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_usual_machine_is_left_to_ray(machine: Path) -> None:
    with local_options() as options:
        assert options == {} and "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_gets_a_folder_that_holds_its_sockets(
    variable: str, machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = machine / ("long" * 12)
    monkeypatch.setenv(variable, str(long))
    with local_options() as options:
        assert options == {"_temp_dir": "/tmp/ray"}
    monkeypatch.setenv(variable, "/proc/none")
    with local_options() as options:
        assert options == {"_temp_dir": "/tmp/ray"}
    assert [record.message for record in caplog.records] == [
        f"{long} is too long a path for sockets: Ray keeps its files in /tmp/ray",
        "/proc/none cannot be written: Ray keeps its files in /tmp/ray",
    ]
    monkeypatch.setattr(starting, "SHORT_FOLDERS", ("/proc/none", "/proc/self"))
    with pytest.raises(WorkerError, match=r"/proc/none cannot be written, .* set RAY_TMPDIR"):
        with local_options():
            pass


def test_the_kernel_agrees_about_the_longest_path(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest folder that is left to Ray, and one that is longer by a letter, with a socket where Ray has it."""
    fits = {}
    for length in range(20, 60):
        folder = Path("/tmp/" + "x" * (length - 5))
        name = folder / "ray" / f"session_2026-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / "plasma_store"
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(name))
            except FileNotFoundError:
                fits[length] = True
            except OSError:  # AF_UNIX path too long
                fits[length] = False
        assert starting._holds_sockets(folder / "ray") is fits[length], length
    assert set(fits.values()) == {True, False}


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_without_a_home_ray_gets_a_token_for_the_session(
    home: str | None, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home is None:  # as of a user without an entry, whom nobody has given a HOME
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", home)
    with local_options() as options:
        assert options == {} and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with local_options():
        assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_shared_memory_the_object_store_lies_in_a_file(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "SHARED_MEMORY", Path("/proc/none"))
    with local_options() as options:
        assert options == {"_plasma_directory": "/tmp"}
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", f"{short}/new")
        with local_options() as options:
            assert options == {"_plasma_directory": f"{short}/new"}
            assert Path(short, "new").is_dir(), "Ray takes no other"


AN_ODD_PLACE = """
import os, ray
from bruno_ray.settings import RaySettings
from bruno_ray.workers.session import ray_session
with ray_session(RaySettings(workers=1)):
    @ray.remote
    def folder():
        return os.getcwd()
    print(ray.get(folder.remote()))
"""
AS_UV_DOES = (
    f"import subprocess, sys; sys.exit(subprocess.run([{sys.executable!r}, '-c', {AN_ODD_PLACE!r}]).returncode)"
)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_starts_under_uv_run_in_a_large_folder_with_a_long_tmpdir_and_no_home(tmp_path: Path) -> None:
    """`uv run` is told by the command line of the parent; Ray then packs the folder, which may hold 512 MiB at most."""
    (tmp_path / "run").write_text(AS_UV_DOES)
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(600 * 1024**2)
    long = tmp_path / ("long" * 12)
    long.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": "/proc/none", "TMPDIR": str(long), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        ["uv", "run"],
        executable=sys.executable,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path), "workers stay where the driver is"


def test_workers_do_not_give_way_to_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts them at niceness 15 otherwise. Who has set it is left alone."""
    (variable,) = starting.ENVIRONMENT
    monkeypatch.delenv(variable, raising=False)
    with local_options():
        assert os.environ[variable] == "0"
    assert variable not in os.environ
    monkeypatch.setenv(variable, "7")
    with local_options():
        assert os.environ[variable] == "7"
    assert os.environ[variable] == "7"
