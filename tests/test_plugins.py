"""Direction methods and scorers from outside, as the examples are: from a file, and from an installed package."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bruno_ray import plugins
from bruno_ray.directions import METHODS, build_bank
from bruno_ray.errors import SettingsError
from bruno_ray.pipeline.steps import plugin_hashes, with_plugins
from bruno_ray.scoring.registry import make_scorers
from bruno_ray.settings import DirectionSettings, ScoringSettings, Settings

EXAMPLES = Path(__file__).parent.parent / "examples" / "plugins"
TRIMMED = f"{EXAMPLES / 'trimmed_difference.py'}:trimmed_difference"
LENGTH = f"{EXAMPLES / 'answer_length.py'}:AnswerLength"
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
        ("class Thing: name = 'thing'", "mine.py:Thing", "is no scorer, it has no metrics, needs_unedited, prepare"),
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
