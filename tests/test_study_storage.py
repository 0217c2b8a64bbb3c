"""Opening a study: what is refused, what a driver that has died leaves behind, what an older version has written."""

import multiprocessing
import os
import socket
from pathlib import Path

import psutil
import pytest

from bruno_ray.errors import StudyError
from bruno_ray.settings import SearchSettings, Settings
from bruno_ray.study.fingerprint import first_difference, same_model, study_fingerprint
from bruno_ray.study.storage import load_study, open_study
from tests.support.fakes import FakeInfo
from tests.support.waiting import wait_for

OBJECTIVES = ("behaviour_rate", "kl_divergence")
FINGERPRINT = {"model": {"id": "A", "fingerprint": "1"}, "prompts": "p"}


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        pass
    other = {**FINGERPRINT, "model": {"id": "B", "fingerprint": "sha256:" + "ab" * 32}}
    with pytest.raises(StudyError, match=r"made with model = A \(1\), this run has B \(sha256:abababababab\)"):
        with open_study("test", None, tmp_path, OBJECTIVES, other):
            pass
    with pytest.raises(StudyError, match="objectives"):
        with open_study("test", None, tmp_path, ("kl_divergence", "behaviour_rate"), FINGERPRINT):
            pass


def test_the_same_model_under_another_name_or_in_another_folder_goes_on(tmp_path: Path) -> None:
    """A local folder may be renamed between runs, or lie elsewhere on the machine that takes over."""
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        study.ask()
    renamed = {**FINGERPRINT, "model": {"id": "/elsewhere/B", "fingerprint": "1"}}
    nameless = {**FINGERPRINT, "model": {"fingerprint": "1"}}
    for fingerprint in (renamed, nameless, FINGERPRINT):
        with open_study("test", None, tmp_path, OBJECTIVES, fingerprint) as study:
            assert len(study.trials) == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompts": "q"}, "prompts = p, this run has q"),
        ({"model": {"fingerprint": "1", "dtype": "float16"}}, r"model\.dtype = None, this run has float16"),
    ],
)
def test_what_else_differs_is_named(changed: dict, said: str, tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        pass
    with pytest.raises(StudyError, match=said):
        with open_study("test", None, tmp_path, OBJECTIVES, {**FINGERPRINT, **changed}):
            pass


def test_a_study_of_a_version_without_kernels_goes_on_and_one_with_others_does_not() -> None:
    def of(**search: tuple[str, ...]) -> dict:
        return study_fingerprint(Settings(search=SearchSettings(**search)), FakeInfo(), "p")

    assert "kernels" not in of()["settings"]["search"]  # as versions wrote it that had no kernels to choose from
    found = first_difference(of(), of(kernels=("linear", "cosine")))
    assert found == ("settings.search.kernels", None, ["linear", "cosine"])


def test_two_drivers_at_once_are_refused(tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        with pytest.raises(StudyError, match="another process"):
            with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
                pass


def test_two_drivers_on_one_database_are_refused_from_any_directory(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    other = multiprocessing.get_context("spawn").Process(target=_hold_study, args=(url, tmp_path / "b", tmp_path))
    other.start()
    try:
        wait_for(lambda: (tmp_path / "held").exists() or not other.is_alive(), "the other process has the study")
        with pytest.raises(StudyError, match=f"process {other.pid}"):
            with open_study("test", url, tmp_path / "a", OBJECTIVES, FINGERPRINT):
                pass
    finally:
        other.kill()
        other.join()
    with open_study("test", url, tmp_path / "a", OBJECTIVES, FINGERPRINT) as study:  # it is dead now
        assert study.user_attrs["driver"]["pid"] == os.getpid()


def _hold_study(url: str, folder: Path, signal_folder: Path) -> None:
    with open_study("test", url, folder, OBJECTIVES, FINGERPRINT):
        (signal_folder / "held").touch()
        multiprocessing.Event().wait()


def test_a_driver_on_another_machine_must_be_taken_over_knowingly(tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        pass
    study.set_user_attr("driver", {"host": "elsewhere", "pid": 1, "started": 0.0})
    with pytest.raises(StudyError, match=r"elsewhere.*take-over"):
        with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
            pass
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT, take_over=True) as study:
        assert study.user_attrs["driver"]["host"] == socket.gethostname()


def test_a_reused_process_id_is_not_a_live_driver(tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        pass
    parent = psutil.Process(os.getppid())
    driver = {"host": socket.gethostname(), "pid": parent.pid, "started": parent.create_time() - 100}
    study.set_user_attr("driver", driver)
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        pass


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@localhost:1/x", "sqlite:////no/such/folder/x.db", "nonsense://"]
)
def test_a_storage_that_cannot_be_used_is_one_line_without_the_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"check study\.storage") as caught:
        with open_study("test", url, tmp_path, OBJECTIVES, FINGERPRINT):
            pass
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_journal_that_was_cut_off_opens_and_one_that_is_something_else_does_not(tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        study.ask()
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "wor')
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        assert len(study.trials) == 1
        study.ask()
    assert len(load_study(None, tmp_path, "test").trials) == 2
    journal.write_bytes(b"not a journal\n")
    with pytest.raises(StudyError, match="not a study's journal"):
        with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
            pass


NULS = bytes(3000)


def test_what_a_power_loss_has_left_as_nul_bytes_is_skipped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks that never reached the disk are NULs, with half a record before them and what came later behind."""
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        study.ask()
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "wor' + NULS + b"\n" + NULS)
    assert len(load_study(None, tmp_path, "test").trials) == 1
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        study.ask()
        other = load_study(None, tmp_path, "test")
        study.ask()
        assert len(study.trials) == 3 and len(other.trials) == 3, "a reader goes on behind the gap"
    assert len(load_study(None, tmp_path, "test").trials) == 3
    lost = [record.message for record in caplog.records if "are lost" in record.message]
    assert lost == [
        f"{journal}: {19 + len(NULS) + 1} bytes from byte {len(whole)} on are lost (NUL bytes, as a power loss leaves"
        " them) and skipped: the rest is read"
    ], "once, however often it is read"


def test_a_record_behind_nul_bytes_on_one_line_counts(tmp_path: Path) -> None:
    """A driver of another program goes on writing where the file ends."""
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        study.ask()
    journal = tmp_path / "study.journal"
    head, last = journal.read_bytes()[:-1].rsplit(b"\n", 1)
    journal.write_bytes(head + b"\n" + NULS + last + b"\n")
    assert load_study(None, tmp_path, "test").user_attrs == study.user_attrs


def test_a_journal_without_its_beginning_is_refused_and_not_begun_anew(tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        study.ask()
    journal = tmp_path / "study.journal"
    damaged = NULS + b"\n" + journal.read_bytes().partition(b"\n")[2]
    journal.write_bytes(damaged)
    with pytest.raises(StudyError, match="has lost its beginning"):
        with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
            pass
    with pytest.raises(StudyError, match="has lost its beginning"):
        load_study(None, tmp_path, "test")
    assert journal.read_bytes() == damaged


@pytest.mark.parametrize("line", [b"5", b"[]", b'{"op_code": 99}', b'{"a": 1}', b"\xff\xfe\xfa", b"{" * 50])
def test_a_line_that_is_no_record_is_one_line(line: bytes, tmp_path: Path) -> None:
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        pass
    with open(tmp_path / "study.journal", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(StudyError, match="damaged") as caught:
        load_study(None, tmp_path, "test")
    assert "\n" not in str(caught.value)


def test_reading_a_study_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study"):
        load_study(None, tmp_path, "test")
    assert list(tmp_path.iterdir()) == []


def test_a_study_from_before_tensors_were_digested_is_gone_on_with() -> None:
    old, new = "sha256:0123:none:float32", "sha256:0123:none:float32:89abcdef"
    assert first_difference({"model": {"fingerprint": old}}, {"model": {"fingerprint": new}}) is None
    for other in ("sha256:0123:none:bfloat16:89abcdef", "sha256:0124:none:float32:89abcdef", "sha256:0123:none:float3"):
        assert first_difference({"model": {"fingerprint": old}}, {"model": {"fingerprint": other}}) is not None
    assert first_difference({"model": {"fingerprint": new}}, {"model": {"fingerprint": old}}) is not None
    commit = "0123456789" * 4
    assert same_model("me/mine@unknown:abcd:none:float32", f"me/mine@{commit}:abcd:none:float32:89abcdef")
    assert not same_model(f"me/mine@{commit}:abcd", f"me/mine@{commit[::-1]}:abcd")
