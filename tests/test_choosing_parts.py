"""Experts are chosen by where tokens go, heads by what they do; what a model has no place for is said."""

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bruno_ray.ablation.edit import SHIFTS, AblationParameters, Edit
from bruno_ray.ablation.places import further_places
from bruno_ray.errors import ModelError, SettingsError
from bruno_ray.exporting import direction_file, lora
from bruno_ray.exporting.base import Options
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.parts import (
    Routing,
    chosen_heads,
    head_effects,
    head_projections,
    routing,
    target_experts,
)
from bruno_ray.model.architectures import find_architecture
from bruno_ray.pipeline.steps import choose_parts, find_directions, left_out, open_run, require_places
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.publishing.saving import save_model
from bruno_ray.settings import SearchSettings
from bruno_ray.study.space import edit_from_params, search_space
from tests.support import tiny_models
from tests.support.engine_helpers import loaded_from
from tests.support.inline_pool import InlinePool, use_inline_pools
from tests.support.live_helpers import KERNEL, NARROW, batch, difference, logits, make_bank
from tests.support.saved_run import settings_for
from tests.test_exports import baked, merged, source_of, written_weights

EVERYWHERE = AblationParameters(1.0, 0.0, 1.0, 99.0)


def engine_of(family: str, **changes: object) -> BatchEngine:
    return BatchEngine(loaded_from(tiny_models.build(family, **changes), lean_forward=False))


# ----- experts -----


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_routing_counts_every_token_once_and_no_padding(family: str) -> None:
    """Prompts of one batch, padded, are routed as each alone; a token goes to two of the four experts."""
    engine = engine_of(family)
    prompts = [list(range(1, 4)), list(range(40, 60)), list(range(100, 107))]
    together = routing(engine, prompts)
    alone = [routing(engine, [prompt]) for prompt in prompts]
    total = sum(map(len, prompts))
    for layer, shares in enumerate(together.shares):
        if shares is None:
            assert family == "qwen3_moe"
            assert layer == 0  # the dense one
            continue
        assert sum(shares) == pytest.approx(2)
        by_hand = [
            sum(len(prompt) * (one.shares[layer] or ())[expert] for prompt, one in zip(prompts, alone)) / total
            for expert in range(4)
        ]
        assert shares == pytest.approx(by_hand)


@torch.no_grad()
def test_experts_that_target_prompts_use_more_are_found() -> None:
    """Planted: the router of layer 1 sends tokens of one kind to experts 0 and 2, those of the other to 1 and 3."""
    model = tiny_models.build("mixtral")
    layer = model.model.layers[1]
    x: list[torch.Tensor] = []
    layer.mlp.gate.register_forward_pre_hook(lambda module, args: x.append(args[0]))
    target, baseline = [[7] * 6], [[200] * 9]
    for prompts in (target, baseline):
        model(input_ids=torch.tensor(prompts))
    one, two = (rows.mean(0) for rows in x)
    layer.mlp.gate.weight.copy_(torch.stack([one, two, one, two]) * 10)
    engine = BatchEngine(loaded_from(model, lean_forward=False))
    chosen = target_experts(routing(engine, target), routing(engine, baseline))
    assert chosen[1] == (0, 2)


def test_entropy_of_routing_by_hand() -> None:
    even, one, two = (0.5,) * 4, (1.0, 0, 0, 0), (1.0, 1.0, 0, 0)
    assert Routing((None, even)).entropy() == pytest.approx(1)
    assert Routing((one,)).entropy() == pytest.approx(0)
    assert Routing((two, even)).entropy() == pytest.approx((math.log(2) / math.log(4) + 1) / 2)
    assert Routing((None,)).entropy() is None


def test_entropy_is_that_of_the_edited_routers() -> None:
    """Planted: routers that read nothing but v send all tokens where their bias says once v is taken from that."""
    engine = engine_of("gpt_oss")
    bank = make_bank(3)
    v = bank["b"][1, 0]
    with torch.no_grad():
        for layer in engine.model.model.layers:
            seen = v * layer.post_attention_layernorm.weight
            layer.mlp.router.weight.copy_(torch.outer(torch.tensor([1.0, -1.0, 2.0, -2.0]), seen))
            layer.mlp.router.bias.copy_(torch.tensor([0.002, 0.001, 0.0, 0.0]))
    edit = engine.editor.resolve(Edit({"router": EVERYWHERE}, "b", 0.0, "none"), bank)
    prompts = [list(range(20)), list(range(90, 120))]
    before, after = routing(engine, prompts).entropy(), routing(engine, prompts, edit).entropy()
    assert before > 0.8
    assert after == pytest.approx(0.5)  # two of four experts, always the same


# ----- heads -----


@torch.no_grad()
def test_the_head_that_writes_the_direction_is_found_by_projection_and_by_effect() -> None:
    """Planted: of all heads only head 3 of layer 1 writes along v, and writes more of it for target prompts."""
    model = tiny_models.build("llama")
    v = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(2)), dim=0)
    for layer in model.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight -= torch.outer(v, v @ weight)
    target, baseline = [[5, 6, 7, 8]], [[50, 60, 70, 80]]
    seen: list[torch.Tensor] = []
    attention = model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1, 24:32]))
    for prompts in (target, baseline):
        model(input_ids=torch.tensor(prompts))
    handle.remove()
    attention.o_proj.weight[:, 24:32] += torch.outer(v, seen[0] - seen[1])  # what tells the prompts apart, 1 along v
    engine = BatchEngine(loaded_from(model, lean_forward=False))
    directions = v.expand(4, 1, -1)
    along = head_projections(engine, target, baseline, directions)
    assert along[1][3] == pytest.approx(float((seen[0] - seen[1]).square().sum()), rel=1e-4)
    assert max(abs(score) for mine in along for score in mine if score != along[1][3]) < 1e-4
    effects = head_effects(engine, target, {"x": directions}, "x")
    assert effects[1][3] == pytest.approx(float(seen[0] @ (seen[0] - seen[1])), rel=1e-3)
    assert max(abs(score) for mine in effects for score in mine if score != effects[1][3]) < 1e-4
    assert chosen_heads(along, 1 / 12) == ((), (3,), ())


def test_the_share_of_heads_is_of_all_heads() -> None:
    scores = [[0.1, 0.9, 0.3, 0.2], None, [0.8, 0.0, -1.0, 0.7]]
    assert chosen_heads(scores, 0.375) == ((1,), None, (0, 3))
    assert chosen_heads(scores, 0.01) == ((1,), None, ())
    assert chosen_heads(scores, 1) == ((0, 1, 2, 3), None, (0, 1, 2, 3))


# ----- the search -----


def test_what_is_switched_on_is_searched_and_nothing_else() -> None:
    """Off, the space is what it was before there was any of it."""
    choices = {"experts:target": {"mlp": ((0, 2), None)}, "heads:causal": {"attention": ((), (1,))}}
    plain = search_space(SearchSettings(), ("x",), 2, ("attention", "mlp"), choices)
    assert not any(name.startswith(("router", "addition", "experts", "heads")) for name in plain)
    search = SearchSettings(further=("router",), experts=("all", "target"), heads=("causal",))
    space = search_space(search, ("x",), 2, ("attention", "mlp", "router"), choices)
    assert space["experts"].choices == ("all", "target")
    assert "heads" not in space  # one option is no parameter
    params = {name: getattr(each, "high", "target") for name, each in space.items()} | {"direction_scope": "global"}
    edit = edit_from_params(params, search, ("x",), choices)
    assert edit.components["router"].max_weight == 1.0
    assert edit.parts == {"mlp": ((0, 2), None), "attention": ((), (1,))}
    assert edit_from_params(params | {"experts": "all"}, search, ("x",), choices).parts == {"attention": ((), (1,))}
    without = edit_from_params({**params, "experts": "target"}, search, ("x",), {})
    assert without.parts == {}, "a model without experts edits all it has"
    assert Edit.from_dict(edit.to_dict()) == edit
    assert "parts" not in without.to_dict(), "edits without parts are written as before"


def test_what_a_model_has_no_place_for_is_said_and_an_error_if_it_is_required(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(tiny_models.write(tmp_path / "m", "llama"), tmp_path, ("e",))
    search = SearchSettings(further=("router", "addition", "mlp_input"), experts=("target",))
    settings = settings.model_copy(update={"search": search})
    pool = InlinePool(settings)
    info = pool.call("describe")
    assert set(left_out(settings, info)) == {"router", "addition", "experts"}
    with caplog.at_level(logging.WARNING):
        require_places(settings, info)
    assert "router edits are left out: this model has no place for them (it is no mixture of experts)" in caplog.text
    required = settings.model_copy(update={"search": search.model_copy(update={"require": ("router",)})})
    with pytest.raises(SettingsError, match=r"no place for router edits.*search\.require"):
        require_places(required, info)
    run = open_run(settings, tmp_path / "run", info, load_prompts(settings))
    assert "no mixture" in run.read().left_out["experts"]


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("llama", {"router", "addition", "experts"}),
        ("gpt2", {"router", "experts"}),
        ("gpt_oss", set()),
        ("mixtral", {"addition"}),
        ("gemma4_text", {"router", "attention_input", "mlp_input", "addition"}),
    ],
)
def test_places_by_family(family: str, missing: set[str]) -> None:
    places = further_places(find_architecture(tiny_models.build(family)))
    assert {name for name, reason in places.items() if reason} == missing


def test_a_run_keeps_the_experts_and_heads_that_it_has_chosen(tmp_path: Path) -> None:
    settings = settings_for(tiny_models.write(tmp_path / "m", "mixtral"), tmp_path, ("e",))
    search = SearchSettings(experts=("all", "target"), heads=("projection", "causal"))
    settings = settings.model_copy(update={"search": search})
    pool, prompts = InlinePool(settings), load_prompts(settings)
    info = pool.call("describe")
    run = open_run(settings, tmp_path / "run", info, prompts)
    bank = find_directions(run, run.read(), info, prompts, pool)
    record = choose_parts(run, info, prompts, bank, pool)
    assert set(record.choices) == {"experts:target", "heads:projection", "heads:causal"}
    assert all(0 < len(part or ()) < 4 for part in record.choices["experts:target"]["mlp"])
    n_heads = sum(len(part or ()) for part in record.choices["heads:causal"]["attention"])
    assert n_heads == 3  # a quarter of 12
    pool.calls.clear()
    assert choose_parts(run, info, prompts, bank, pool).choices == record.choices
    assert not pool.calls, "a run that goes on chooses nothing anew"


# ----- forms -----


def test_an_adapter_holds_edits_of_what_is_read_and_of_some_heads(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base", "llama")
    edit = Edit(
        {"attention": KERNEL, "attention_input": KERNEL, "mlp_input": NARROW},
        "b",
        None,
        "pre",
        {"attention": ((0, 3), (1,), ())},
    )
    source = source_of(base, edit)
    assert "It is exact" in lora.export(source, tmp_path / "adapter", Options())
    inputs = batch(3)
    expected = logits(baked(source), inputs)
    assert difference(logits(merged(base, tmp_path / "adapter"), inputs), expected) < 1e-4


@pytest.mark.parametrize(
    ("family", "component", "match"),
    [
        ("mixtral", "router", "MixtralTopKRouter, to which no adapter"),
        ("mixtral", "mlp_input", "experts in one tensor"),
        ("gpt2", "addition", "adds to biases"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused_by_name(
    family: str, component: str, match: str, tmp_path: Path
) -> None:
    source = source_of(tiny_models.write(tmp_path / "base", family), Edit({component: NARROW}, "b", None, "none"))
    source.bank[SHIFTS] = source.bank["b"]
    with pytest.raises(ModelError, match=match):
        lora.export(source, tmp_path / "adapter", Options())
    assert not (tmp_path / "adapter").exists()


def test_a_file_of_directions_holds_all_of_it(tmp_path: Path) -> None:
    base = tiny_models.write(tmp_path / "base", "gpt_oss")
    edit = Edit(
        {"attention": KERNEL, "mlp": KERNEL, "router": EVERYWHERE, "addition": NARROW, "mlp_input": NARROW},
        "b",
        None,
        "full",
        {"mlp": ((0, 2), None, (1,))},
    )
    source = source_of(base, edit)
    source.bank[SHIFTS] = 3 * source.bank["b"]
    direction_file.export(source, tmp_path / "file", Options())
    described, read, bank = direction_file.read(tmp_path / "file")
    assert (described.format, read) == (2, edit)
    assert torch.equal(bank[SHIFTS], source.bank[SHIFTS])


@pytest.mark.parametrize("further", [{}, {"router": EVERYWHERE, "addition": NARROW}])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_saved_files_hold_edits_of_some_experts(family: str, further: dict, tmp_path: Path) -> None:
    """Copied with other bytes in them, or written by transformers where the edit reaches other tensors."""
    if family == "qwen2_moe":
        further = {name: each for name, each in further.items() if name != "addition"}
    base = tiny_models.write(tmp_path / "base", family)
    parts = {"mlp": ((0, 2), (3,), None), "attention": ((1,), None, (0, 3))}
    source = source_of(base, Edit({"attention": KERNEL, "mlp": KERNEL, **further}, "b", None, "full", parts))
    source.bank[SHIFTS] = 3 * source.bank["b"]
    save_model(source.model, source.edit, source.bank, tmp_path / "saved", card=lambda _: "card")
    saved = loaded_from(tiny_models_from(tmp_path / "saved")).model
    expected = baked(source)
    for name, weight in written_weights(expected).items():
        torch.testing.assert_close(written_weights(saved)[name], weight, rtol=1e-5, atol=1e-6)
    assert difference(logits(saved, batch(3)), logits(expected, batch(3))) < 1e-5


def tiny_models_from(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


# ----- the lean forward pass -----


def test_the_lean_pass_steps_aside_for_what_is_read_and_carries_heads() -> None:
    model = tiny_models.build("llama")
    expected = {}
    bank = make_bank(3)
    edits = {
        "read": Edit({"attention_input": KERNEL, "mlp_input": KERNEL}, "b", None, "none"),
        "heads": Edit({"attention": EVERYWHERE}, "a", 0.5, "full", {"attention": ((0, 2),) * 3}),
    }
    slow = BatchEngine(loaded_from(tiny_models.build("llama"), lean_forward=False))
    engine = BatchEngine(loaded_from(model))
    assert engine._lean is not None
    prompts = [[1, 2, 3, 4], [9, 8, 7, 6, 5]]
    for name, edit in edits.items():
        expected[name] = slow.next_logits(prompts, [slow.editor.resolve(edit, bank), None])
        found = engine.next_logits(prompts, [engine.editor.resolve(edit, bank), None])
        assert difference(found, expected[name]) < 1e-4
        assert difference(found[0], found[1]) > 1e-2


# ----- the whole story -----


@pytest.mark.slow
def test_a_study_with_all_of_it_is_searched_saved_reported_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampler, schedule, worker, saving, report and exports of the product; Ray alone is left out."""
    from bruno_ray.ablation.edit import direction_sets_of
    from bruno_ray.cli.main import main
    from bruno_ray.pipeline.steps import evaluation_context
    from bruno_ray.study.fingerprint import study_fingerprint
    from bruno_ray.study.run import make_schedule
    from bruno_ray.study.selection import load_trials
    from bruno_ray.study.storage import open_study
    from bruno_ray.workers.messages import Scored, edit_outcome

    settings = settings_for(tiny_models.write(tmp_path / "m", "gpt_oss"), tmp_path, ("e", "a"))
    search = SearchSettings(
        further=("router", "attention_input", "mlp_input", "addition"), experts=("all", "target"), heads=("causal",)
    )
    study_settings = settings.study.model_copy(update={"n_trials": 4, "n_startup_trials": 4})
    settings = settings.model_copy(update={"search": search, "study": study_settings})
    pool, prompts = InlinePool(settings), load_prompts(settings)
    info = pool.call("describe")
    run = open_run(settings, settings.output.directory / "mine", info, prompts)
    bank = find_directions(run, run.read(), info, prompts, pool)
    assert SHIFTS in bank
    assert SHIFTS not in direction_sets_of(bank)
    record = choose_parts(run, info, prompts, bank, pool)
    context = evaluation_context(record, prompts, "validation", bank)
    pool.set_context(context)
    fingerprint = study_fingerprint(settings, info, prompts.fingerprint)
    with open_study("mine", None, run.path, settings.scoring.objectives, fingerprint) as study:
        schedule = make_schedule(settings, study, context, info)
        while due := schedule.take_due():
            for one in due:
                edits = [one.edits[number] for number in one.missing]
                outcomes = pool.call("evaluate", edits, one.rivals, with_context=True)
                schedule.bring(one.batch_id, Scored("here", tuple(map(edit_outcome, outcomes))))
        schedule.settle()
        trials = load_trials(study)
    assert [trial.state for trial in trials] == ["COMPLETE"] * 4
    assert len({trial.values["kl_divergence"] for trial in trials}) == 4
    last = trials[-1].edit
    assert set(last["components"]) == {"attention", "mlp", *search.further}
    assert set(last["parts"]) >= {"attention"}
    use_inline_pools(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["save", str(run.path), "--trial", "3"]) == 0
    record = run.read()
    assert record.selected.number == 3
    tested, saved = record.selected.test.values, record.selected.saved.values
    assert saved["kl_divergence"] == pytest.approx(tested["kl_divergence"], rel=1e-3)
    assert "before" in record.extra["entropy_of_routing"]
    report = (run.path / "report.html").read_text()
    for text in ("entropy of routing", "heads in 3 layers", "addition"):
        assert text in report
    assert "heads in 3 layers" in (run.model_folder / "README.md").read_text()
    assert main(["export", f"{run.path}:3", "--to", "directions", str(tmp_path / "file")]) == 0
    assert main(["apply", str(tmp_path / "file"), str(tmp_path / "m"), "--to", str(tmp_path / "applied")]) == 0
    pair = [tiny_models_from(folder) for folder in (run.model_folder, tmp_path / "applied")]
    assert torch.equal(logits(pair[0], batch(2)), logits(pair[1], batch(2)))
