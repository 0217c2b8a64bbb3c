"""What the documentation tells people to type is what the command line takes, and every page is in the site."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from bruno_ray.cli.parser import parse
from bruno_ray.errors import SettingsError
from bruno_ray.settings.sources import load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXAMPLE = ROOT / "examples" / "tutorial" / "mine.toml"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Whole commands in its blocks of code."""
    lines = [
        line for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if not kind for line in text.splitlines()
    ]
    starts = [line.removeprefix("$ ") for line in lines]
    return [line for line in starts if line.startswith("bruno-ray ") and not re.search(r"\.\.\.|\[|<|COMMAND", line)]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_its_commands_are_commands(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        if words[0] in ("cluster", "--version"):
            continue  # its own parser: tests/cluster/test_cli.py
        try:
            parse(words)
        except SettingsError as error:
            pytest.fail(f"{line}: {error}")


def test_commands_are_found_in_the_pages() -> None:
    found = {page.stem: len(commands(page)) for page in PAGES}
    assert found["tutorial"] >= 8 and found["exports"] >= 2 and sum(found.values()) > 30


def test_the_tutorial_shows_the_file_that_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (shown,) = [block for kind, block in FENCE.findall(text) if kind == "toml"]
    assert tomllib.loads(shown) == tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT)
    settings = load(config=EXAMPLE, environ={}).settings
    files = [settings.prompts.target.train, settings.prompts.baseline.train]
    for source in files:
        assert source is not None
        lines = Path(source.source).read_text(encoding="utf-8").splitlines()
        assert len(set(lines)) == 80 and lines[0] in text


def test_every_page_is_in_the_site() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]  # type: ignore[union-attr]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == [page.name for page in PAGES]
