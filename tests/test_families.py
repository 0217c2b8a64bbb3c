"""All decoder families of transformers: every row of the table is what probing finds; nothing ends in a traceback."""

import re
from pathlib import Path

import pytest

from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import find_architecture
from bruno_ray.model.families import FAMILIES, REFUSED
from bruno_ray.model.probing import probe
from tests.support import all_families
from tests.support.family_sweep import FAULTS, WORKS, verdict

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
LINES = re.findall(r"^\| (\S+) \| (\S*) \| ([a-z ]+) \|", PAGE.read_text(encoding="utf-8"), re.M)
BY_TEXT_TYPE = {text: family for family, text, status in LINES if status == "supported"}
BY_HAND = {"doge", "nanochat", "zaya", "gemma3n_text"}
"""Their blocks scale the stream channel by channel before they add to it, or carry several, so that sums do not come
out; their rows were written by hand, and the sweep holds live edits against baked ones."""
LEFT_ALONE = {"gemma4_text": "per_layer_projection"}


def test_the_page_has_every_row_of_the_table() -> None:
    assert set(BY_TEXT_TYPE) == set(FAMILIES)
    assert not [line for line in LINES if line[2] in FAULTS]
    assert sum(status in WORKS for _, _, status in LINES) >= 128
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("text_type", sorted(FAMILIES))
def test_the_row_is_what_probing_finds(text_type: str) -> None:
    model = all_families.tiny_model(BY_TEXT_TYPE[text_type])
    row = find_architecture(model)
    if text_type in BY_HAND:
        with pytest.raises(ModelError, match=r"stays unexplained|one residual stream"):
            probe(model)
        return
    found, _ = probe(model)

    def places(architecture):
        return {
            (writer.name, writer.component, writer.stacked, tuple((m.index, m.transposed) for m in writer.matrices))
            for writer in architecture.writers
            if LEFT_ALONE.get(text_type, "\n") not in writer.name
        }

    assert places(found) == places(row)
    assert found.layers == row.layers
    assert found.final_norm is row.final_norm
    assert found.embedding is row.embedding


@pytest.mark.nightly
@pytest.mark.parametrize("model_type", sorted(all_families.families()))
def test_no_family_is_wrong_or_ends_in_a_traceback(model_type: str, tmp_path: Path) -> None:
    got = verdict(model_type, tmp_path / "model")
    expected = {family: status for family, _, status in LINES}.get(model_type)
    assert got.status == expected, got.detail
