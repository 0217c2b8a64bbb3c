"""docs/parity.md names files, tests and settings; each of them has to exist."""

import ast
import re
from pathlib import Path

from bruno_ray.settings import Settings
from bruno_ray.settings.keys import leaves

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([^`\s]+)`", TEXT)


def test_every_file_that_is_named_exists() -> None:
    files = [name.partition("::")[0] for name in NAMED if "/" in name]
    assert len(files) > 150
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_test_that_is_named_is_a_test_of_that_file() -> None:
    named = [name.split("::") for name in NAMED if "::" in name]
    missing = []
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        if not any(isinstance(node, ast.FunctionDef) and node.name == test for node in ast.walk(tree)):
            missing.append(f"{file}::{test}")
    assert len(named) > 90 and missing == []


def test_every_setting_that_is_named_is_one() -> None:
    known = {key for key, _ in leaves()} | set(Settings.model_fields) | {"search.mlp"}
    dotted = [name for name in NAMED if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)]
    settings = [name for name in dotted if not name.endswith((".html", ".json", ".yaml"))]
    assert len(settings) > 30
    assert [name for name in settings if name not in known] == []


def test_a_row_has_a_file_and_a_test_or_says_why_not() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| f")]
    assert len(rows) > 110
    assert [row for row in rows if "::" not in row and "not built" not in row] == []
