"""Caching, copying and concurrency of ``build``, with a recipe that trains in seconds."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from bruno_ray import organism as organisms
from bruno_ray.errors import OutputError
from bruno_ray.organism import RECIPES, read_rows

MOMENT = dataclasses.replace(
    RECIPES["standard"],
    name="moment",
    layers=2,
    width=16,
    heads=2,
    hidden=16,
    fact_steps=2,
    refusal_steps=2,
    frozen=("model.embed_tokens.",),
    test_prompts=8,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RECIPES, "moment", MOMENT)
    return tmp_path / "cache"


def test_builds_once_and_holds_everything(cache, tmp_path):
    folder = organisms.build(recipe="moment", threads=1)
    assert folder.parent == cache / "organisms"
    assert {path.name for path in folder.iterdir()} == {"model", "prompts", "markers.json", "card.json"}
    assert {path.stem for path in (folder / "prompts").iterdir()} == {
        f"{side}_{part}" for side in ("target", "baseline") for part in ("train", "validation", "test")
    }
    card = json.loads((folder / "card.json").read_text())
    assert card["recipe"]["name"] == "moment"
    assert organisms.measure(folder) == card["figures"]
    assert json.loads((folder / "markers.json").read_text()) == list(MOMENT.markers)

    written = (folder / "card.json").stat().st_mtime_ns
    assert organisms.build(recipe="moment", threads=1) == folder
    assert (folder / "card.json").stat().st_mtime_ns == written
    assert organisms.build(recipe="moment", seed=5, threads=1) != folder

    copy = organisms.build(tmp_path / "deep" / "copy", recipe="moment", threads=1)
    assert read_rows(copy, "target_test") == read_rows(folder, "target_test")
    weights = "model/model.safetensors"
    assert (copy / weights).read_bytes() == (folder / weights).read_bytes()


def test_same_seed_same_weights(cache, tmp_path, monkeypatch):
    first = organisms.build(recipe="moment", threads=1)
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "other"))
    second = organisms.build(recipe="moment", threads=1)
    assert first != second
    weights = "model/model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


def _build(cache: str, queue) -> None:
    os.environ["BRUNO_CACHE"] = cache
    RECIPES["moment"] = MOMENT
    queue.put(str(organisms.build(recipe="moment", threads=1)))


@pytest.mark.slow
def test_concurrent_builders_train_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    builders = [context.Process(target=_build, args=(str(tmp_path), queue)) for _ in range(2)]
    for builder in builders:
        builder.start()
    folders = {queue.get(timeout=300) for _ in builders}
    for builder in builders:
        builder.join()
    assert len(folders) == 1
    # The lock, and one folder: nobody's half-written copy is left.
    assert len([path for path in (tmp_path / "organisms").iterdir() if path.is_dir()]) == 1
    assert organisms.measure(Path(folders.pop()))["restricted_prompts"] == 8


def test_an_unknown_recipe_names_the_known_ones(cache):
    with pytest.raises(OutputError, match="standard, hard"):
        organisms.build(recipe="impossible")


def test_a_folder_that_holds_something_else_is_left_alone(cache, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(OutputError, match="holds something else"):
        organisms.build(tmp_path / "mine", recipe="moment", threads=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="BRUNO_CACHE"):
        organisms.build(threads=1)
