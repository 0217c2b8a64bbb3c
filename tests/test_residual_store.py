"""What was computed is read back exactly; what is damaged, foreign or half-written is computed again."""

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bruno_ray.errors import OutputError
from bruno_ray.residuals.store import ResidualStore, residual_key

KEY = residual_key("model", [[1, 2], [3]], answer_tokens=0)
SHAPE = (2, 3, 5)  # positions, stream points, d_model


def residuals(n_prompts: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((n_prompts, *SHAPE)).astype(np.float32)


@pytest.fixture
def filled(tmp_path: Path) -> ResidualStore:
    store = ResidualStore(tmp_path, KEY, n_prompts=10, shard_size=4)
    for shard in store.missing():
        store.write(shard, residuals(10)[shard.start : shard.stop])
    return store


def again(store: ResidualStore) -> ResidualStore:
    """The same store in a later run."""
    return ResidualStore(store.folder.parent, KEY, n_prompts=10, shard_size=4)


def test_a_second_run_reads_everything_back(filled):
    assert [(shard.start, shard.stop) for shard in filled.shards] == [(0, 4), (4, 8), (8, 10)]
    later = again(filled)
    assert later.missing() == []
    np.testing.assert_array_equal(later.read(), residuals(10))


def test_a_single_shard_is_a_view_into_the_file(tmp_path):
    store = ResidualStore(tmp_path, KEY, n_prompts=3)
    store.write(store.shards[0], residuals(3))
    array = store.read()
    assert array.dtype == np.float32 and not array.flags.owndata and not array.flags.writeable


def test_no_prompts_nothing_missing(tmp_path):
    assert ResidualStore(tmp_path, KEY, n_prompts=0).missing() == []


def test_a_killed_run_finds_its_finished_shards(filled):
    filled.path(filled.shards[1]).unlink()
    (filled.folder / ".prompts-00004-00007.arrow.partial-elsewhere-1-abc").write_bytes(b"half")
    later = again(filled)
    assert [shard.index for shard in later.missing()] == [1]
    with pytest.raises(OutputError, match=r"shards 1 of .* are missing"):
        later.read()
    later.write(later.shards[1], residuals(10)[4:8])
    np.testing.assert_array_equal(later.read(), residuals(10))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    value = residuals(10)[5].tobytes()[:16]
    data[data.index(value)] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def replace_with_text(path: Path) -> None:
    path.write_text("not an Arrow file")


def replace_with_foreign_arrow(path: Path) -> None:
    table = pa.table({"residual": [1.0, 2.0]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def replace_with_a_neighbour(path: Path) -> None:
    path.write_bytes(path.with_name("prompts-00000-00003.arrow").read_bytes())


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, truncate, cut_to_nothing, replace_with_text, replace_with_foreign_arrow, replace_with_a_neighbour],
)
def test_a_damaged_file_is_noticed_and_computed_again(filled, damage, caplog):
    damage(filled.path(filled.shards[1]))
    later = again(filled)
    assert [shard.index for shard in later.missing()] == [1]
    assert "prompts-00004-00007.arrow" in caplog.text and "computed again" in caplog.text
    later.write(later.shards[1], residuals(10)[4:8])
    np.testing.assert_array_equal(again(filled).read(), residuals(10))


def test_another_number_of_prompts_per_shard_is_not_mistaken(filled):
    other = ResidualStore(filled.folder.parent, KEY, n_prompts=10, shard_size=5)
    for shard in other.missing():
        other.write(shard, residuals(10)[shard.start : shard.stop])
    np.testing.assert_array_equal(other.read(), residuals(10))
    np.testing.assert_array_equal(again(filled).read(), residuals(10))


def test_every_input_that_matters_changes_the_key():
    keys = {
        KEY,
        residual_key("other", [[1, 2], [3]], answer_tokens=0),
        residual_key("model", [[1, 2], [4]], answer_tokens=0),
        residual_key("model", [[1], [2, 3]], answer_tokens=0),
        residual_key("model", [[3], [1, 2]], answer_tokens=0),
        residual_key("model", [[1, 2], [3]], answer_tokens=1),
        residual_key("model", ["a", "b"], answer_tokens=0),
    }
    assert len(keys) == 7
    assert residual_key("model", [(1, 2), np.array([3])], answer_tokens=0) == KEY


def test_several_writers_of_one_shard_do_no_harm(tmp_path):
    stores = [ResidualStore(tmp_path, KEY, n_prompts=10, shard_size=10) for _ in range(4)]
    threads = [threading.Thread(target=store.write, args=(store.shards[0], residuals(10))) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(stores[0].read(), residuals(10))
    assert [path.name for path in stores[0].folder.iterdir()] == ["prompts-00000-00009.arrow"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = ResidualStore(tmp_path, KEY, n_prompts=3)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device.*residuals\.cache_dir"):
        store.write(store.shards[0], residuals(3))
    assert list(store.folder.iterdir()) == []


def test_a_cache_that_cannot_be_made_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"residuals\.cache_dir"):
        ResidualStore(tmp_path / "file", KEY, n_prompts=3)


def test_what_a_killed_writer_left_is_swept_by_the_next_and_a_living_ones_is_left(filled):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name = f".prompts-00000-00003.arrow.partial-{socket.gethostname()}"
    dead, alive = filled.folder / f"{name}-{gone.pid}-abc", filled.folder / f"{name}-{os.getpid()}-abc"
    for path in (dead, alive):
        path.write_bytes(b"half")
    filled.write(filled.shards[0], residuals(10)[:4])
    assert not dead.exists() and alive.exists()


def test_the_store_needs_no_torch():
    code = "import sys, bruno_ray.residuals.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
