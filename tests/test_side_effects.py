"""How much of the weights an edit changes, and what becomes of protected prompts."""

from pathlib import Path

import pytest
import torch

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.changes import changed_shares
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.resolving import Resolver
from bruno_ray.model.loading import load_model
from bruno_ray.pipeline import side_effects
from bruno_ray.pipeline.side_effects import best_by_method, method_of
from bruno_ray.publishing import wording
from bruno_ray.runs.records import MethodRecord, RunRecord, ScoresRecord, SelectedRecord
from bruno_ray.settings import ModelSettings, Settings
from bruno_ray.study.selection import TrialRecord
from tests.support import tiny_models
from tests.support.live_helpers import EDITS, KERNEL, NARROW, make_bank


def weights_of(folder: Path, edit: Edit | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All weights that write to the residual stream or read from it, baked, by name; and the component of each."""
    loaded = load_model(ModelSettings(id=str(folder), dtypes=("float32",)))
    architecture = loaded.architecture
    if edit is not None:
        bake(architecture, edit, make_bank(architecture.n_layers, architecture.d_model))
    sites = {f"{site.name} {site.component}": site for site in architecture.sites}
    return (
        {name: torch.cat([matrix.read().flatten() for matrix in site.matrices]) for name, site in sites.items()},
        {name: site.component for name, site in sites.items()},
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_shares_are_those_of_the_baked_weights(family: str, tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "model", family)
    edits = [*EDITS[:3], Edit({"mlp": NARROW}, "a", None, "full")]
    if family == "qwen2_moe":  # two experts of each layer, one head, and what reads the stream
        parts = {"mlp": ((0, 2),) * 3, "attention": ((1,),) * 3}
        edits.insert(0, Edit({"attention": KERNEL, "mlp": KERNEL, "mlp_input": KERNEL}, "b", None, "full", parts))
    before, component_of = weights_of(folder, None)
    architecture = load_model(ModelSettings(id=str(folder), dtypes=("float32",))).architecture
    bank = make_bank(architecture.n_layers, architecture.d_model)
    found = changed_shares(architecture, Resolver(architecture).resolve_all(edits, bank))
    for edit, shares in zip(edits, found):
        after, _ = weights_of(folder, edit)
        assert shares.keys() >= {"attention", "mlp"} and shares.keys() >= edit.components.keys()
        for component in shares:
            names = [name for name, own in component_of.items() if own == component]
            old, new = (torch.cat([weights[name] for name in names]) for weights in (before, after))
            assert shares[component] == pytest.approx(float((new - old).norm() / old.norm()), abs=1e-6)
    assert all(found[0][component] > 0.01 for component in edits[0].components)
    assert found[-1]["attention"] == 0


def trial(number: int, direction_set: str, rate: float, kl: float) -> TrialRecord:
    values = {"behaviour_rate": rate, "kl_divergence": kl}
    edit = Edit({}, direction_set, None, "none").to_dict()
    return TrialRecord(number, "COMPLETE", edit, values, {"behaviour_rate": (round(rate * 10), 10)})


def test_each_method_has_its_best_trial() -> None:
    trials = [
        trial(0, "subspace@0", 0.5, 0.01),
        trial(1, "subspace@1|protect0.5", 0.0, 0.02),
        trial(2, "difference_in_means@0", 0.3, 0.5),
        trial(3, "difference_in_means@0", 0.9, 0.3),
        trial(4, "learned-0123", 0.1, 0.01),
    ]
    best = best_by_method(trials, Settings())
    assert {method: found.number for method, found in best.items()} == {
        "subspace": 1,
        "difference_in_means": 3,
        "trained": 4,
    }, "of those above the bound the one of lowest KL"
    assert method_of("subspace@1|protect0.5") == "subspace"


def record() -> RunRecord:
    scores = ScoresRecord(values={"behaviour_rate": 0.0, "kl_divergence": 0.0123}, counts={"behaviour_rate": (0, 10)})
    selected = SelectedRecord(
        number=1,
        edit=EDITS[0].to_dict(),
        validation=scores,
        changed={"attention": 0.031, "mlp": 0.02},
        kept={"declined": (3, 4)},
    )
    methods = [
        MethodRecord(method="subspace", trial=1, validation=scores, changed={"attention": 0.031, "mlp": 0.02}),
        MethodRecord(method="trained", trial=9, validation=scores, changed={"mlp": 0.5}),
    ]
    return RunRecord(settings=Settings(), selected=selected, methods=methods)


def test_what_people_read() -> None:
    header, rows = wording.method_rows(record())
    assert header[-2:] == ["attention", "mlp"]
    assert rows[0][:2] == ["subspace", "1"] and rows[0][-2:] == ["3.1 %", "2.0 %"] and rows[1][-2:] == ["-", "50.0 %"]
    assert wording.kept_rows(record()) == [("declined", "3/4 (30.1 % to 95.4 %)")]
    assert side_effects.changed_text({"attention": 0.031}).startswith("3.1 % of attention")
