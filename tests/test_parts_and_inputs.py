"""Edits of some experts or heads, of what modules read, and additions: live equals baked, each does what it says."""

import pytest
import torch
from torch import Tensor, nn

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import SHIFTS, AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import Architecture, find_architecture
from bruno_ray.model.coverage import coverage
from bruno_ray.model.read_sites import READING
from tests.support import all_families, tiny_models
from tests.support.live_helpers import KERNEL, NARROW, batch, difference, logits, make_bank
from tests.test_families import BY_TEXT_TYPE

EVERYWHERE = AblationParameters(1.0, 0.0, 1.0, 99.0)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "qwen3_5_moe_text")


def with_shifts(bank: DirectionBank) -> DirectionBank:
    shift = torch.randn(bank["b"].shape, generator=torch.Generator().manual_seed(8))
    return bank | {SHIFTS: shift}


def of_layers(architecture: Architecture, component: str, part: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return (part,) * architecture.n_layers


def live_and_baked(family: str, edits: list[Edit], **changes: object) -> list[tuple[float, float]]:
    """(difference of live from baked, what the edit changes) per edit; all of them and an unedited row in one batch."""
    model = tiny_models.build(family, **changes)
    architecture = find_architecture(model)
    bank = with_shifts(make_bank(architecture.n_layers))
    n = len(edits)
    inputs, rows = batch(n + 2), [*range(n + 1), 0]
    plain = logits(model, inputs)
    editor = LiveEditor(architecture)
    editor.set([*editor.resolve_all(edits, bank), None], rows)
    live = logits(model, inputs)
    editor.clear()
    assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(live[n], plain[n]), "an unedited row changes beside edited ones"
    found = []
    for k, edit in enumerate(edits):
        mine = torch.tensor([row == k for row in rows])
        baked = tiny_models.build(family, **changes)
        bake(find_architecture(baked), edit, bank)
        found.append((difference(live[mine], logits(baked, inputs)[mine]), difference(live[mine], plain[mine])))
    return found


# ----- mixtures of experts -----


@pytest.mark.parametrize("family", MIXTURES)
def test_everything_that_the_experts_write_is_reached(family: str) -> None:
    model = tiny_models.build(family)
    architecture = find_architecture(model)
    rows = coverage(model, architecture)
    expected = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(("down_proj", "down_proj.weight", "down_proj_bias"))
    )
    (mlp,) = [row for row in rows if row.component == "mlp"]
    assert (mlp.reached, mlp.total) == (expected, expected)
    left = {row.detail for row in rows if row.component == "not reached"}
    assert left <= {"embedding", "biases"}  # gpt_oss: of attention; its experts' are columns of the map


@pytest.mark.parametrize("family", MIXTURES)
def test_some_experts_live_equal_baked(family: str) -> None:
    layers = tiny_models.build(family).config.get_text_config().num_hidden_layers
    some = (None, (1, 3), (), (0,))[:layers]
    edits = [
        Edit({"attention": KERNEL, "mlp": KERNEL}, "a", 0.5, "none", {"mlp": some}),
        Edit({"mlp": EVERYWHERE}, "b", None, "pre", {"mlp": ((0, 2),) * layers}),
        Edit({"mlp": EVERYWHERE}, "a", 1.3, "full", {"mlp": ((2,),) * layers}),
        Edit({"attention": NARROW, "mlp": KERNEL}, "b", None, "full"),
    ]
    for live_from_baked, change in live_and_baked(family, edits):
        assert live_from_baked < 1e-4 < 1e-3 < change


@torch.no_grad()
def test_experts_that_are_left_out_keep_what_they_write() -> None:
    """By hand, of a layer of gpt_oss: each expert's own output, bias included, weighted as the router says."""
    model = tiny_models.build("gpt_oss")
    architecture = find_architecture(model)
    bank, inputs = make_bank(architecture.n_layers), batch(2)
    v = bank["b"][1, 0]
    experts = model.model.layers[0].mlp.experts
    given: list[tuple] = []
    written: list[Tensor] = []
    handle = experts.register_forward_pre_hook(lambda module, args: given.append(args))
    editor = LiveEditor(architecture)
    second = experts.register_forward_hook(lambda module, args, output: written.append(output))
    editor.set([editor.resolve(Edit({"mlp": EVERYWHERE}, "b", None, "none", {"mlp": ((1, 2),) * 3}), bank)], [0, 0])
    logits(model, inputs)
    handle.remove()
    second.remove()
    x, index, weights = given[0]
    expected = torch.zeros_like(x)
    for expert in range(4):
        gate_up = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        out = experts._apply_gate(gate_up) @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        if expert in (1, 2):
            out = out - torch.outer(out @ v, v)
        expected += out * (weights * (index == expert)).sum(1, keepdim=True)
    assert difference(written[0], expected) < 1e-5


# ----- what is read -----


class Watched:
    """What passes through one block: the stream before it, what its norms give, what its other modules are given."""

    def __init__(self, block: nn.Module, norms: set[int]) -> None:
        self.stream: list[Tensor] = []
        self.norms: dict[int, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        for name, module in block.named_modules():
            if id(module) in norms:
                module.register_forward_hook(self.note_norm)
            else:
                module.register_forward_pre_hook(self.noting(name), with_kwargs=True)

    def note_norm(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.norms[id(module)] = output

    def noting(self, name: str):
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if name == "":
                self.stream.append(given)
            elif args:
                self.inputs[name] = given

        return note


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt2", "olmo2", "cohere2", "qwen3_moe", "gpt_oss", "granitemoe"]
)
def test_readers_read_what_their_norm_makes_of_the_stream(family: str) -> None:
    """Watched: the very numbers that each reader is given are its norm's output, or the block's input; and whatever
    else of the block has a matrix for these is a reader too."""
    hold_against_watched(tiny_models.build(family))


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("family", sorted(READING))
def test_readers_of_every_family_read_what_their_norm_makes_of_the_stream(family: str) -> None:
    hold_against_watched(all_families.tiny_model(BY_TEXT_TYPE[family]))


def hold_against_watched(model: nn.Module) -> None:
    architecture = find_architecture(model)
    norms = {id(reader.norm) for reader in architecture.readers}
    watched = [Watched(block, norms) for block in architecture.layers]
    model(input_ids=torch.arange(20).reshape(2, 10))
    n_compared = 0
    for layer, (block, seen) in enumerate(zip(architecture.layers, watched)):
        readers = {id(reader.module): reader for reader in architecture.readers if reader.layer == layer}
        assert {reader.component for reader in readers.values()} >= {"attention_input", "mlp_input"}
        read = set()
        for name, x in seen.inputs.items():
            reader = readers.get(id(block.get_submodule(name)))
            if reader is None or (reader.norm is None and reader.component != "attention_input"):
                continue  # what an MLP reads without a norm is no module's output
            source = seen.stream[0] if reader.norm is None else seen.norms[id(reader.norm)]
            assert torch.equal(x.flatten(), source.flatten()), name
            read.add(x.data_ptr())
            n_compared += 1
        for name, x in seen.inputs.items():
            weight = getattr(block.get_submodule(name), "weight", None)
            is_matrix = isinstance(weight, Tensor) and weight.ndim == 2 and min(weight.shape) > 1
            if is_matrix and x.data_ptr() in read:
                assert id(block.get_submodule(name)) in readers, f"layer {layer}: {name} reads the stream"
    assert n_compared >= 3


READING_SAMPLE = ("llama", "gemma2", "gpt2", "gpt_oss", "qwen3_5_moe_text", "deepseek_v3")


@pytest.mark.parametrize("family", READING_SAMPLE)
def test_edits_of_what_is_read_live_equal_baked(family: str) -> None:
    mixture = any(reader.component == "router" for reader in find_architecture(tiny_models.build(family)).readers)
    edits = [
        Edit({"attention_input": KERNEL}, "a", 0.5, "full"),
        Edit({"mlp_input": KERNEL, "attention": KERNEL}, "b", None, "pre"),
        Edit({"attention_input": NARROW, "mlp_input": EVERYWHERE}, "a", 1.3, "none"),
    ]
    if mixture:
        edits.append(Edit({"router": EVERYWHERE}, "b", None, "none"))
    for live_from_baked, change in live_and_baked(family, edits):
        assert live_from_baked < 1e-4 < 1e-3 < change


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gemma2", "gpt2"])
def test_readers_no_longer_see_the_direction_behind_their_norm(family: str) -> None:
    """Planted: the stream moves along v, by what changes no other value of the normalised stream. An edited weight
    answers as if it had not moved; without the norm's gain in the account it would."""
    model = tiny_models.build(family)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(4)))
    architecture = find_architecture(model)
    bank = make_bank(architecture.n_layers)
    reader = next(r for r in architecture.readers if r.component == ("router" if family == "mixtral" else "mlp_input"))
    v = bank["b"][reader.layer + 1, 0]
    assert reader.norm is not None
    stream = torch.randn(1, 5, architecture.d_model, generator=torch.Generator().manual_seed(6))
    if family == "gpt2":
        stream, v = stream - stream.mean(-1, keepdim=True), v - v.mean()
    along = stream - (stream @ v)[..., None] * v / v.square().sum()  # nothing along v ...
    moved = along + 0.7 * v * along.norm(dim=-1, keepdim=True)  # ... and something, which the norm scales down
    scale = moved.square().mean(-1, keepdim=True).sqrt() / along.square().mean(-1, keepdim=True).sqrt()

    def answers(weight: Tensor) -> Tensor:
        return (reader.norm(moved) * scale - reader.norm(along)) @ weight

    bias = reader.norm(torch.zeros_like(along)) if family == "gpt2" else 0
    seen = (reader.norm(moved) - bias) * scale - (reader.norm(along) - bias)
    before = reader.matrices[0].read().clone()
    bake(architecture, Edit({reader.component: EVERYWHERE}, "b", None, "none"), bank)
    after = reader.matrices[0].read()
    assert (seen @ after).abs().max() < 1e-4 * (seen @ before).abs().max()
    plain = before - torch.outer(v, v @ before) / v.square().sum()
    assert (seen @ plain).abs().max() > 1e-2 * (seen @ before).abs().max()


def test_a_component_that_the_model_has_no_place_for_is_refused() -> None:
    architecture = find_architecture(tiny_models.build("llama"))
    editor = LiveEditor(architecture)
    for component in ("router", "addition"):
        with pytest.raises(ModelError, match=f"component {component}, which this model has no place for"):
            editor.resolve(Edit({component: EVERYWHERE}, "b", None, "none"), make_bank(architecture.n_layers))


def test_experts_and_heads_of_another_model_are_refused() -> None:
    architecture = find_architecture(tiny_models.build("mixtral"))
    bank = make_bank(architecture.n_layers)
    for component, parts in (("mlp", ((4,), None, None)), ("attention", ((7,), None, None)), ("mlp", (None, (0,)))):
        with pytest.raises(ModelError, match="does not have: choose an edit that was found on this model"):
            LiveEditor(architecture).resolve(Edit({component: EVERYWHERE}, "b", None, "none", {component: parts}), bank)


# ----- heads -----


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_5_text", "deepseek_v3"])
def test_some_heads_live_equal_baked(family: str) -> None:
    layers = tiny_models.build(family).config.get_text_config().num_hidden_layers
    edits = [
        Edit({"attention": KERNEL, "mlp": KERNEL}, "a", 0.5, "none", {"attention": ((0, 3),) * layers}),
        Edit({"attention": EVERYWHERE}, "b", None, "full", {"attention": ((1,),) * layers}),
        Edit({"attention": EVERYWHERE}, "b", None, "none"),
    ]
    for live_from_baked, change in live_and_baked(family, edits):
        assert live_from_baked < 1e-4 < 1e-3 < change


@torch.no_grad()
def test_a_head_is_its_columns_also_where_heads_share_keys() -> None:
    """Planted: only head 2 of layer 0 writes along v. An edit of it takes that out, one of the others none."""
    model = tiny_models.build("llama")  # 4 heads over 2 of keys and values
    architecture = find_architecture(model)
    bank = make_bank(architecture.n_layers)
    v, weight = bank["b"][1, 0], model.model.layers[0].self_attn.o_proj.weight
    weight -= torch.outer(v, v @ weight)
    weight[:, 16:24] += torch.outer(v, torch.ones(8))
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    editor = LiveEditor(architecture)
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    for part in ((2,), (0, 1, 3)):
        edit = Edit({"attention": EVERYWHERE}, "b", None, "none", {"attention": (part, (), ())})
        editor.set([editor.resolve(edit, bank)], [0, 0])
        logits(model, batch(2))
    before, with_two, _, with_others = seen
    assert (with_two @ v).abs().max() < 1e-5 < 1e-2 < (before @ v).abs().max()
    assert difference(with_others, before) < 1e-6


# ----- additions -----


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_an_addition_lives_in_the_bias_of_attention(family: str) -> None:
    layers = tiny_models.LAYERS
    edits = [
        Edit({"addition": NARROW}, "b", None, "none"),
        Edit({"addition": KERNEL, "attention": KERNEL, "mlp": KERNEL}, "a", 0.5, "full"),
        Edit({"addition": KERNEL, "attention": KERNEL}, "b", None, "pre", {"attention": ((1,),) * layers}),
    ]
    for live_from_baked, change in live_and_baked(family, edits):
        assert live_from_baked < 1e-4 < 1e-3 < change


@torch.no_grad()
def test_an_addition_of_strength_1_moves_the_stream_by_the_difference_of_means() -> None:
    model = tiny_models.build("gpt2")
    architecture = find_architecture(model)
    bank, inputs = with_shifts(make_bank(architecture.n_layers)), batch(2)
    streams: list[Tensor] = []
    model.transformer.h[1].attn.c_proj.register_forward_hook(lambda module, args, output: None)
    model.transformer.h[1].ln_2.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    editor = LiveEditor(architecture)
    logits(model, inputs)
    editor.set([editor.resolve(Edit({"addition": NARROW}, "b", None, "none"), bank)], [0, 0])  # layer 1 alone
    logits(model, inputs)
    torch.testing.assert_close(streams[1] - streams[0], (-bank[SHIFTS][2, 0]).expand_as(streams[0]), atol=1e-5, rtol=0)
