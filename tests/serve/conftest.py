"""Three servers for all tests that talk to one, each started when it is first needed, and one xdist worker for each.

server   at the root, behind a key, with pages: base, trials, the run, its saved model, one that never ends an answer
small    open to others, with a key that it makes, without pages, with little room and little patience: the endless
         model, and a base in four bits with its trials
copies   below a prefix, without a key, with pages: the run and the endless model, one or two copies of each

A test belongs to the server whose fixture it takes; the tests of one server run in one worker, one after the other,
and the server ends with the last of them: idle it would take a tenth of a core from the tests that follow.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.server import Server, make_run, serving
from tests.support.shared import once

SERVERS = ("server", "small", "copies")
TALKATIVE = "talkative"
CONTEXT = 32_768
"""Of the talkative model: more tokens than any machine writes in the time that a test has."""

ORIGIN = "https://chat.example.org"
PREFIX = "/deep/down"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    served = sorted(filter(server_of, items), key=server_of)
    for item in served:
        item.add_marker(pytest.mark.xdist_group(server_of(item)))
    first = next((place for place, item in enumerate(items) if server_of(item)), 0)
    rest = [item for item in items if not server_of(item)]
    items[:] = [*rest[:first], *served, *rest[first:]]


def server_of(item: pytest.Item | None) -> str:
    """Name of the server that a test talks to; empty if none."""
    names = getattr(item, "fixturenames", ()) if item is not None and "/serve/" in str(item.path) else ()
    return next((name for name in SERVERS if name in names), "")


@pytest.hookimpl(trylast=True)  # once the test's own fixtures are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    name = server_of(item)
    if name and name != server_of(nextitem):
        assert isinstance(item, pytest.Function)
        item._fixtureinfo.name2fixturedefs[name][-1].finish(item._request)


@pytest.fixture(scope="session")
def served_run(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the organism with six trials, one selected and saved in ``model``."""
    return once(tmp_path_factory, "served-run", make_run)


@pytest.fixture(scope="session")
def talkative(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved model without a way to end a greedy answer, so that there is something to watch and to stop; and with
    a context that takes long prompts."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / TALKATIVE
    shutil.copytree(served_run / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    head = tensors["lm_head.weight"]
    head[config["eos_token_id"]] = head[config["pad_token_id"]]  # which was never an answer
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def server(served_run: Path, talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = ("--model", str(served_run / "model"), "--model", str(talkative))
    with serving(tmp_path_factory.mktemp("server"), str(served_run), *models) as server:
        server.run, server.talkative = served_run, TALKATIVE
        yield server


@pytest.fixture(scope="session")
def small(four_bit: Path, talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Ends with ``test_small_server.py``, whose last test stops it."""
    where = ("--host", "0.0.0.0", "--cors-origin", ORIGIN, "--no-pages")
    room = ("--max-rows", "2", "--max-waiting", "2", "--request-timeout", "10")
    models = (str(four_bit), "--model", str(talkative))
    with serving(tmp_path_factory.mktemp("small"), *models, *where, *room, key="") as server:
        server.talkative = TALKATIVE
        yield server


@pytest.fixture(scope="session")
def copies(served_run: Path, talkative: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    where = ("--route-prefix", PREFIX, "--no-key", "--max-replicas", "2")
    models = (str(served_run), "--model", str(talkative))
    with serving(tmp_path_factory.mktemp("copies"), *models, *where, key="") as server:
        server.run, server.talkative = served_run, TALKATIVE
        yield server


@pytest.fixture(scope="session")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a tiny model that is loaded in four bits, and whose chat template has tools."""
    from bruno_ray.settings import ModelSettings
    from tests.serve.test_catalog import make_run
    from tests.support import tiny_models
    from tests.support.tool_templates import TEMPLATES

    where = tmp_path_factory.mktemp("four-bit")
    model = tiny_models.write(where / "tiny-4bit", "llama", **tiny_models.FOR_4BIT)
    tiny_models.build_tokenizer(TEMPLATES["llama"]).save_pretrained(model)
    settings = ModelSettings(id=str(model), dtypes=("float32",), quantization="bnb_4bit")
    return make_run(where / "four-bit", settings, d_model=tiny_models.FOR_4BIT["hidden_size"]).path
