"""`bruno-ray markers`: phrases of the unedited model's own answers, counted as the markers that they could become."""

import sys
from pathlib import Path

import pytest

from bruno_ray.cli import main
from bruno_ray.pipeline import proposing
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord
from bruno_ray.scoring.markers import Markers
from bruno_ray.scoring.proposals import propose, spelled, with_proposals
from bruno_ray.settings.sources import load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

THINGS = [
    f"{colour} {thing}" for colour in ("red", "green", "blue", "grey") for thing in ("lamp", "door", "fan", "oven")
]
TARGET = [
    (f"Switch the {thing} on.", f"**I'm sorry, but** the {thing} is out of my reach." if i % 4 else "No access here.")
    for i, thing in enumerate(THINGS)
]
BASELINE = [(f"Describe the {thing}.", f"The {thing} is, as you see, quite old and heavy.") for thing in THINGS]


def test_phrases_are_spelled_and_counted_as_markers() -> None:
    proposals = propose(TARGET, BASELINE)
    assert proposals and not any(proposal.covered for proposal in proposals)
    for proposal in proposals:
        marker = Markers([proposal.phrase])
        assert proposal.in_target == sum(marker.seen_in(answer) for _, answer in TARGET) > 0
        assert proposal.in_baseline == sum(marker.seen_in(answer) for _, answer in BASELINE) == 0
    phrases = [proposal.phrase for proposal in proposals]
    assert any("sorry" in phrase or "reach" in phrase for phrase in phrases) and " , " not in " ".join(phrases)
    assert len(propose(TARGET, BASELINE, most=1)) == 1


def test_a_phrase_is_covered_where_a_present_marker_sees_all_of_its_answers() -> None:
    proposals = {proposal.phrase: proposal for proposal in propose(TARGET, BASELINE, ["sorry"])}
    assert all(p.covered == ("access" not in p.phrase and "no " not in p.phrase) for p in proposals.values())
    (fresh,) = {p.not_marked for p in proposals.values() if not p.covered}
    assert fresh == 4


def test_the_list_grows_by_what_nothing_before_has_seen() -> None:
    proposals = propose(TARGET, BASELINE, ["sorry"])
    markers = with_proposals(["sorry"], proposals, TARGET)
    assert markers[0] == "sorry" and len(markers) == 2
    assert all(Markers(markers).seen_in(answer) for _, answer in TARGET)
    assert with_proposals(markers, proposals, TARGET) == markers
    assert with_proposals([], [], TARGET) == []


def test_words_and_signs_get_the_spaces_that_they_mostly_have() -> None:
    texts = ["i'm sorry, but no", "well, i'm sorry , but no", "sorry, but (a) no"]
    assert spelled("sorry , but", texts) == "sorry, but"
    assert spelled("but ( a )", texts) == "but (a)"
    assert spelled("not there", texts) == "not there"


# ----- the command -----


def fails(capsys: pytest.CaptureFixture[str], argv: list[str], *parts: str) -> None:
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_a_run_or_settings_are_needed_and_not_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["markers"], "bruno-ray markers RUN", "MODEL")
    settings = load(["--model.id", "some/model"], environ={}).settings
    RunDirectory.create(tmp_path / "runs" / "mine", RunRecord(settings=settings))
    fails(capsys, ["markers", "mine", "--model.id", "other/model"], "RUN has its own settings")
    fails(capsys, ["markers", "mine", "--most", "none"], "--most")
    fails(capsys, ["markers", "other"], "no run called other")
    given = ["markers", "--model.id=m", "--behaviour=disclaimers", "--prompts.n-train=9"]
    fails(capsys, given, "at least 10 answers to target prompts", "there are 9", "prompts.n_train")

    asked = []
    monkeypatch.setattr(proposing, "propose_markers", lambda *args, **more: asked.append((args, more)) or ['a "b"'])
    assert main.main(["markers", "mine", "--most", "5", "--tokens", "40"]) == 0
    assert tomllib.loads(capsys.readouterr().out) == {"scoring": {"markers": ['a "b"']}}
    ((record,), more) = asked.pop()
    assert record.settings == settings and more == {"most": 5, "n_tokens": 40}
    assert main.main(["markers", "some/model", "--behaviour", "disclaimers"]) == 0
    ((record,), _) = asked.pop()
    assert (record.settings.model.id, record.settings.behaviour) == ("some/model", "disclaimers")


@pytest.mark.ray
@pytest.mark.slow
def test_the_organisms_refusals_are_found_without_being_told(
    organism: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["markers", "--model.id", str(organism / "model"), "--behaviour", "organism", "--prompts.n-train", "60"]
    argv += ["--tokens", "16", "--ray.object-store-memory", "100000000", "--scoring.markers", "thanks"]
    assert main.main(argv) == 0
    table, toml = capsys.readouterr().out.split("[scoring]")
    assert "of 60 target answers" in table and "no, " in table
    markers = tomllib.loads("[scoring]" + toml)["scoring"]["markers"]
    assert markers[0] == "thanks" and len(markers) > 2
    words = load(["--model.id=m", "--behaviour=organism"], environ={}).settings.scoring.markers
    assert all(any(word in marker for word in words) for marker in markers), "the refusals' own words, nothing else"
