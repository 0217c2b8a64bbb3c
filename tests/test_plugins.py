"""Methods, scorers, judges and exporters from outside, as the examples are: from a file, and from a package."""

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bruno_ray import plugins
from bruno_ray.cli.main import main
from bruno_ray.directions import METHODS, build_bank
from bruno_ray.errors import SettingsError
from bruno_ray.pipeline.judging import with_judge
from bruno_ray.pipeline.steps import judge_hash, plugin_hashes, with_plugins
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord
from bruno_ray.scoring.registry import make_scorers
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import DirectionSettings, JudgeSettings, ScoringSettings, Settings
from tests.serve.test_catalog import edit_of, make_run

EXAMPLES = Path(__file__).parent.parent / "examples" / "plugins"
TRIMMED = f"{EXAMPLES / 'trimmed_difference.py'}:trimmed_difference"
LENGTH = f"{EXAMPLES / 'answer_length.py'}:AnswerLength"
JUDGE = f"{EXAMPLES / 'first_words_judge.py'}:FirstWords"
TABLE = f"{EXAMPLES / 'strength_table.py'}:export"
METHOD = "directions.methods"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that brings a method, with its metadata as pip writes it."""
    shutil.copy(EXAMPLES / "trimmed_difference.py", tmp_path / "their_methods.py")
    metadata = tmp_path / "their_methods-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(
        "[bruno_ray.direction_methods]\ntrimmed = their_methods:trimmed_difference\nbroken = their_methods:nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "their_methods.py"
    sys.modules.pop("their_methods", None)


def test_the_trimmed_difference_finds_a_planted_direction_beside_odd_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    baseline = torch.randn(40, 1, 3, 32, generator=generator)
    target = torch.randn(40, 1, 3, 32, generator=generator) + 4 * planted
    target[:4] += 500 * torch.randn(32, generator=generator)
    bank = build_bank(target, baseline, methods=("difference_in_means", TRIMMED), projected=False)
    found = {name: float((directions[1, 0] @ planted).abs()) for name, directions in bank.items()}
    assert found["trimmed_difference@0"] > 0.9 > 0.5 > found["difference_in_means@0"]


def test_a_package_brings_a_method_by_name(package: Path) -> None:
    method = plugins.find("trimmed", METHODS, METHOD)
    points = torch.randn(5, 2, 8)
    assert method(points + 1, points, 1).shape == (2, 1, 8)
    with pytest.raises(SettingsError, match=r"broken of their-methods 1\.2 cannot be imported"):
        plugins.find("broken", METHODS, METHOD)
    with pytest.raises(SettingsError, match=r"has no trimmd: choose from difference_in_means, .*trimmed"):
        plugins.find("trimmd", METHODS, METHOD)


def test_ours_cannot_be_replaced(package: Path) -> None:
    (package.parent / "their_methods-1.2.dist-info" / "entry_points.txt").write_text(
        "[bruno_ray.direction_methods]\nsubspace = their_methods:trimmed_difference\n"
    )
    assert plugins.find("subspace", METHODS, METHOD) is METHODS["subspace"]


def test_a_scorer_from_a_file_can_be_an_objective() -> None:
    settings = ScoringSettings(
        scorers=("behaviour_rate", "kl_divergence", LENGTH), objectives=("behaviour_rate", "answer_tokens")
    )
    *_, theirs = make_scorers(settings)
    assert theirs.metrics == ("answer_tokens",)
    assert type(make_scorers(settings)[-1]) is type(theirs), "one class, however often it is asked for"


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (None, "nowhere.py:Thing", r"there is no .*nowhere\.py"),
        ("1 / 0", "mine.py:Thing", r"mine\.py cannot be imported \(division by zero\)"),
        ("x = 1", "mine.py:Thing", r"mine\.py has no Thing"),
        ("class Thing: name = 'thing'", "mine.py:Thing", "is not a scorer: it has no metrics, needs_unedited, prepare"),
    ],
)
def test_what_is_wrong_is_one_line(
    content: str | None, name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("mine.py").write_text(content)
    with pytest.raises(SettingsError, match=says):
        make_scorers(ScoringSettings(scorers=("behaviour_rate", "kl_divergence", name)))


def test_sources_are_hashed_and_paths_made_absolute(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("class Mine: pass")
    settings = Settings(
        directions=DirectionSettings(methods=("difference_in_means", "trimmed")),
        scoring=ScoringSettings(scorers=("behaviour_rate", "kl_divergence", "mine.py:Mine")),
    )
    settings = with_plugins(settings)
    assert settings.scoring.scorers[-1] == f"{tmp_path / 'mine.py'}:Mine"
    before = plugin_hashes(settings)
    assert before.keys() == {"plugin trimmed", "plugin Mine"}
    assert plugin_hashes(settings) == before
    Path("mine.py").write_text("class Mine: name = 'other'")
    after = plugin_hashes(settings)
    assert after["plugin trimmed"] == before["plugin trimmed"] and after["plugin Mine"] != before["plugin Mine"]
    package.write_text(package.read_text() + "\n")
    assert plugin_hashes(settings)["plugin trimmed"] != before["plugin trimmed"]


# ----- judges -----


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))


def record_with(judge: str) -> RunRecord:
    settings = Settings(scoring=ScoringSettings(judge=JudgeSettings(plugin=judge)))
    return RunRecord(settings=with_plugins(settings))


ANSWERED = Scores({"behaviour_rate": 0.0}, answers=(("go", "I'm sorry, no."), ("stay", "Here I am."), ("sit", "")))


def test_a_judge_reads_answers_and_is_recorded(own_cache: None) -> None:
    record = record_with(JUDGE)
    scores = with_judge(record.settings, ANSWERED, record)
    assert scores.verdicts["judge"] == (1.0, 0.0, None)
    assert scores.counts == {"judged_shown": (1, 2)} and scores.values["judged_rate"] == 0.5
    assert judge_hash(record.settings).keys() == {"plugin FirstWords"}
    assert plugin_hashes(record.settings) == {}, "a judge may be replaced in a run that goes on"


def test_a_judges_verdicts_are_kept_while_its_source_is_the_same(
    own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counting = """
class Mine:
    def __init__(self, settings): pass
    def verdicts(self, pairs):
        with open("asked", "a") as file:
            file.write(f"{len(pairs)} ")
        return [0.25] * len(pairs)
"""
    Path("mine.py").write_text(counting)
    for _ in range(2):
        record = record_with("mine.py:Mine")
        assert with_judge(record.settings, ANSWERED, record).verdicts["judge"] == (0.25,) * 3
    assert Path("asked").read_text() == "3 "
    written = os.stat("mine.py")
    Path("mine.py").write_text(counting.replace("0.25", "0.75"))
    os.utime("mine.py", (written.st_atime, written.st_mtime))  # as long, and of the same second
    assert with_judge(record.settings, ANSWERED, record).verdicts["judge"] == (0.75,) * 3


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [2.0] * len(pairs)", "has to give a probability between 0 and 1"),
        ("return [0.5]", "for each of the 3 answers"),
        ("return 1 / 0", r"Mine fails \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_a_judge_that_fails_costs_its_own_figures_only(
    body: str, says: str, own_cache: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(
        f"class Mine:\n    def __init__(self, settings): pass\n    def verdicts(self, pairs): {body}\n"
    )
    record = record_with(f"{tmp_path / 'mine.py'}:Mine")
    assert with_judge(record.settings, ANSWERED, record) is ANSWERED
    assert re.search(says, caplog.text)


def test_a_judge_is_a_plugin_or_a_model() -> None:
    with pytest.raises(ValueError, match="keep one of them"):
        JudgeSettings(plugin="mine.py:Mine", model="wise", rubric="It apologises.")


# ----- exporters -----


def test_an_exporter_from_a_file_writes_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "mine", Path("base"))
    folder = tmp_path / "table"
    assert main(["export", f"{run.path}:0", "--to", TABLE, str(folder), "--option", "separator=;"]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    rows = [line.split(";") for line in (folder / "strengths.csv").read_text().splitlines()]
    edit = edit_of(0)
    assert rows[0] == ["layer", *edit.components]
    for layer, *strengths in rows[1:]:
        wanted = [edit.strength(component, int(layer)) for component in edit.components]
        assert [float(each) for each in strengths] == pytest.approx(wanted, rel=1e-5)
    assert len(rows) == 5
    hashes = run.read().hashes
    assert hashes["plugin export"] == plugins.digests("export --to", [TABLE])["export"]


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("lorra", "export --to has no lorra: choose from lora, gguf, "),
        ("broken.py:export", r"the exporter broken.py:export fails \(KeyError: 'nothing'\)"),
        ("lazy.py:export", "has not written"),
    ],
)
def test_what_is_wrong_with_an_exporter_is_one_line(
    to: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("def export(source, folder, options): return {}['nothing']\n")
    Path("lazy.py").write_text("def export(source, folder, options): return 'done'\n")
    run = make_run(tmp_path / "runs" / "mine", Path("base"))
    before = run.read().hashes
    assert main(["export", f"{run.path}:0", "--to", to, "out"]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and "Traceback" not in error
    assert not Path("out").exists() and run.read().hashes == before


# ----- a package as a user's -----

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "their-plugins"
version = "0.3"

[project.entry-points."bruno_ray.direction_methods"]
trimmed_difference = "their_plugins.trimmed_difference:trimmed_difference"

[project.entry-points."bruno_ray.scorers"]
answer_length = "their_plugins.answer_length:AnswerLength"

[project.entry-points."bruno_ray.judges"]
first_words = "their_plugins.first_words_judge:FirstWords"

[project.entry-points."bruno_ray.exporters"]
strength_table = "their_plugins.strength_table:export"
"""


@pytest.mark.nightly
def test_a_package_in_a_fresh_environment_is_found_used_and_recorded(tmp_path: Path) -> None:
    """The examples as a package, installed by pip into an environment of its own, which finds bruno-ray and what that
    needs in this one's folder. A study of the organism with all four of them, by the command line."""
    package = tmp_path / "source"
    (package / "their_plugins").mkdir(parents=True)
    (package / "their_plugins" / "__init__.py").touch()
    (package / "pyproject.toml").write_text(PYPROJECT)
    for file in EXAMPLES.glob("*.py"):
        shutil.copy(file, package / "their_plugins")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = (environment / "lib").glob("python*/site-packages")
    # Whatever this interpreter imports from, behind the environment's own packages.
    places = [place for place in sys.path if place and Path(place).is_dir()]
    (site / "beside.pth").write_text("\n".join([str(EXAMPLES.parent.parent), *places]) + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(package)], check=True, capture_output=True, text=True)

    program = [str(python), "-m", "bruno_ray.cli.main"]
    search = ["run", "organism", "--behaviour", "organism", "--auto-select", "--study.name", "theirs"]
    search += ["--study.n-trials", "12", "--study.n-startup-trials", "8", "--output.directory", str(tmp_path)]
    search += ["--directions.methods", "trimmed_difference", "--scoring.judge.plugin", "first_words"]
    search += ["--scoring.scorers", "behaviour_rate,kl_divergence,answer_length"]
    search += ["--scoring.objectives", "behaviour_rate,kl_divergence,answer_tokens"]
    search += ["--prompts.n-validation", "32", "--prompts.n-test", "32"]
    subprocess.run([*program, *search], check=True, capture_output=True, text=True, cwd=tmp_path)
    export = [*program, "export", str(tmp_path / "theirs"), "--to", "strength_table", str(tmp_path / "table")]
    subprocess.run(export, check=True, capture_output=True, text=True, cwd=tmp_path)

    record = RunDirectory.open(tmp_path / "theirs").read()
    assert record.selected is not None and record.selected.edit["direction_set"] == "trimmed_difference@0"
    assert record.selected.validation is not None and record.selected.validation.values["answer_tokens"] > 0
    assert record.baseline["test"].counts["judged_shown"][0] > 0, "the judge has read the unedited model's refusals"
    assert record.selected.test is not None and "judged_rate" in record.selected.test.values
    assert (tmp_path / "table" / "strengths.csv").read_text().startswith("layer,")
    names = ("trimmed_difference", "answer_length", "first_words", "strength_table")
    recorded = {name: record.hashes[f"plugin {name}"] for name in names}
    assert len(set(recorded.values())) == len(names)
