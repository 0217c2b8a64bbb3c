"""The maths of an edit: kernel, interpolation, closed forms. heretic's published formulas are written out here anew."""

import json
import pickle

import pytest
import torch
from torch.nn.functional import normalize

from bruno_ray.ablation.closed_forms import (
    apply_to_output,
    apply_to_weight,
    directions_for,
    factors,
    factors_from,
    interchanged,
    responses,
    row_norms,
)
from bruno_ray.ablation.edit import AblationParameters, Edit

D, IN, LAYERS = 24, 40, 6
MODES = ("none", "pre", "full")


def orthonormal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random (..., rank, d) with orthonormal rows."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise.transpose(-1, -2))[0].transpose(-1, -2).float().contiguous()


def random_weight(seed: int = 1) -> torch.Tensor:
    """Rows of very different norms."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(D, IN, generator=generator) * torch.logspace(-2, 1, D)[:, None]


def directly(weight: torch.Tensor, directions: torch.Tensor, strength: float, mode: str) -> torch.Tensor:
    """The definition, in float64, without any closed form."""
    w, v = weight.double(), directions.double()
    if mode == "none":
        return w - strength * v.T @ (v @ w)
    rho = w.norm(dim=1, keepdim=True)
    edited = w / rho - strength * v.T @ (v @ (w / rho))
    if mode == "full":
        edited = edited / edited.norm(dim=1, keepdim=True)
    return rho * edited


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_closed_form_is_the_definition(mode: str, rank: int) -> None:
    weight, directions = random_weight(), orthonormal(rank, D)
    edited = apply_to_weight(weight, factors([weight], directions, 1.3, mode))
    torch.testing.assert_close(edited.double(), directly(weight, directions, 1.3, mode), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_output_edit_is_the_weight_edit(mode: str, rank: int) -> None:
    weight, directions, bias = random_weight(), orthonormal(rank, D), torch.randn(D)
    x = torch.randn(5, IN)
    f = factors([weight], directions, 0.8, mode)
    edited = apply_to_output(x @ weight.T + bias, f.left, f.right, f.scale, bias)
    torch.testing.assert_close(edited, x @ apply_to_weight(weight, f).T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_flow_through_the_restored_norms(mode: str, rank: int) -> None:
    """As through the definition, for directions and strength; two weights are one map."""
    weights, wanted = [random_weight(1), random_weight(2)], torch.randn(D, 2 * IN)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        v, strength = orthonormal(rank, D).to(dtype).requires_grad_(), torch.tensor(0.8, dtype=dtype).requires_grad_()
        if dtype == torch.float64:
            edited = directly(torch.cat(weights, dim=1), v, strength, mode)
        else:
            f = factors(weights, v, strength, mode)
            edited = torch.cat([apply_to_output(w.T, f.left, f.right, f.scale).T for w in weights], dim=1)
        return torch.autograd.grad((edited * wanted).sum(), [v, strength])

    for found, expected in zip(gradients(torch.float32), gradients(torch.float64)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_an_interchange_puts_another_outputs_part_where_its_own_was(mode: str, with_bias: bool) -> None:
    weight, directions, bias = random_weight(), orthonormal(2, D), torch.randn(D) * with_bias
    x, other = torch.randn(5, IN), torch.randn(IN)
    f = factors([weight], directions, 1.0, mode)
    assert f.offset is None
    g = interchanged(f, weight @ other)
    own = bias if with_bias else None
    changed = apply_to_output(x @ weight.T + bias, g.left, g.right, g.scale, own, offset=g.offset)
    removed = apply_to_weight(weight, f)
    taken_out = weight @ other - (removed @ other if f.scale is None else (removed @ other) / f.scale)
    put_in = taken_out if f.scale is None else f.scale * taken_out
    torch.testing.assert_close(changed, x @ removed.T + bias + put_in, rtol=1e-4, atol=1e-4)
    if mode == "none":
        torch.testing.assert_close(
            (changed - bias) @ directions.T, (weight @ other @ directions.T).expand(5, 2), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("rank", [1, 4])
def test_full_preserves_row_norms(rank: int) -> None:
    weight = random_weight()
    edited = apply_to_weight(weight, factors([weight], orthonormal(rank, D), 1.0, "full"))
    torch.testing.assert_close(edited.norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=0)
    assert (edited - weight).norm() > 0.05 * weight.norm()


def test_none_at_strength_one_removes_the_subspace_and_is_idempotent() -> None:
    weight, directions = random_weight(), orthonormal(2, D)
    once = apply_to_weight(weight, factors([weight], directions, 1.0, "none"))
    twice = apply_to_weight(once, factors([once], directions, 1.0, "none"))
    assert (directions @ once).abs().max() < 1e-5
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_span_of_the_directions_matters(mode: str) -> None:
    weight, directions = random_weight(), orthonormal(3, D)
    rotated = orthonormal(3, 3, seed=9) @ directions
    one, two = (apply_to_weight(weight, factors([weight], v, 0.7, mode)) for v in (directions, rotated))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_several_weights_are_one_concatenated_map(mode: str) -> None:
    weights = [random_weight(seed) for seed in (1, 2, 3)]
    directions = orthonormal(2, D)
    f = factors(weights, directions, 1.1, mode)
    whole = directly(torch.cat(weights, dim=1), directions, 1.1, mode)
    parts = torch.cat([apply_to_weight(weight, f) for weight in weights], dim=1)
    torch.testing.assert_close(parts.double(), whole, rtol=1e-5, atol=1e-5)


def test_one_reading_serves_many_directions() -> None:
    """H is linear in the direction: of a mixture it is the mixture of the points' H."""
    weight, points = random_weight(), orthonormal(2, D)
    rho = row_norms([weight])
    response = responses([weight], rho, points)
    mixed = normalize(0.3 * points[:1] + 0.7 * points[1:])
    mix_response = (0.3 * response[:1] + 0.7 * response[1:]) / (0.3 * points[:1] + 0.7 * points[1:]).norm()
    expected = factors([weight], mixed, 0.9, "full")
    found = factors_from(mixed, 0.9, "full", rho, mix_response)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["pre", "full"])
def test_zero_rows_stay_zero_and_disturb_nothing(mode: str) -> None:
    weight, directions = random_weight(), orthonormal(1, D)
    weight[3] = 0
    f = factors([weight], directions, 1.0, mode)
    edited = apply_to_weight(weight, f)
    assert all(torch.isfinite(t).all() for t in (f.left, f.right, edited) if t is not None)
    assert (edited[3] == 0).all()
    alive = torch.arange(D) != 3
    expected = directly(weight[alive], directions[:, alive], 1.0, mode)
    torch.testing.assert_close(edited[alive].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_wiped_out_is_not_blown_up() -> None:
    directions = torch.zeros(1, D)
    directions[0, 0] = 1.0  # row 0 lies in the direction and nothing else does: strength 1 removes all of it
    f = factors([random_weight()], directions, 1.0, "full")
    assert f.scale is not None and f.scale.max() <= 1e3


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_without_an_edit_pass_bit_for_bit(scaled: bool) -> None:
    y = torch.randn(2, 3, D, dtype=torch.bfloat16)
    y[0, 0, 0] = float("inf")  # whatever is in them
    directions, bias = orthonormal(2, D), torch.randn(D)
    member = torch.tensor([[False, False], [True, True]])[:, None]
    scale = torch.stack([torch.ones(D), torch.full((D,), 0.5)])[:, None] if scaled else None
    edited = apply_to_output(y, directions, directions, scale, bias, member)
    if scaled:
        y[0, 0, 0] = edited[0, 0, 0] = 0.0  # (1 - 1) * inf is not a number, and neither is that model
    assert torch.equal(edited[0], y[0])
    assert not torch.equal(edited[1], y[1])


# ----- the kernel over layers and the float direction index, as published -----


def published_kernel(parameters: AblationParameters, layer: int) -> float:
    distance = abs(layer - parameters.max_weight_position)
    if distance > parameters.min_weight_distance:
        return 0.0
    high, low = max(parameters.max_weight, 0), max(parameters.max_weight, 0) * parameters.min_weight
    return high + (distance / parameters.min_weight_distance) * (low - high)


def test_kernel_is_the_published_one() -> None:
    for parameters in (
        AblationParameters(1.5, 3.2, 0.25, 2.5),
        AblationParameters(0.9, 5.0, 1.0, 1.0),
        AblationParameters(-0.2, 2.0, 0.5, 9.0),
    ):
        for layer in range(LAYERS):
            assert parameters.strength(layer) == pytest.approx(published_kernel(parameters, layer), abs=1e-12)


def test_kernel_edges() -> None:
    kernel = AblationParameters(max_weight=1.0, max_weight_position=3.0, min_weight=0.5, min_weight_distance=2.0)
    assert [kernel.strength(layer) for layer in range(7)] == [0.0, 0.5, 0.75, 1.0, 0.75, 0.5, 0.0]
    assert AblationParameters(1.0, 3.0, 0.5, 0.0).strength(3) == 1.0  # a peak of one layer
    assert AblationParameters(1.0, 3.0, 0.5, 0.0).strength(4) == 0.0


def test_kernels_of_every_shape_by_hand() -> None:
    """Peak 2 at layer 4, a quarter of it at the edge 4 layers away; layer 9 lies past the other edge."""
    by_hand = {
        "linear": [0.5, 0.875, 1.25, 1.625, 2.0, 0.0],
        "flat": [2.0, 2.0, 2.0, 2.0, 2.0, 0.0],
        "cosine": [0.5, 0.5 + 1.5 * 0.1464466, 1.25, 0.5 + 1.5 * 0.8535534, 2.0, 0.0],
        # exp(-2 x^2) at x = 1, 3/4, 1/2, 1/4, 0 is 0.1353353, 0.3246525, 0.6065307, 0.8824969, 1
        "gaussian": [0.5, 0.5 + 1.5 * 0.2189487, 0.5 + 1.5 * 0.5449457, 0.5 + 1.5 * 0.8641059, 2.0, 0.0],
    }
    for shape, expected in by_hand.items():
        kernel = AblationParameters(2.0, 4.0, 0.25, 4.0, shape)
        assert [kernel.strength(layer) for layer in (0, 1, 2, 3, 4, 9)] == pytest.approx(expected, abs=1e-6), shape
        assert kernel.strength(2) == kernel.strength(6), "it is symmetric"


def test_an_edit_of_a_version_without_shapes_is_linear() -> None:
    kernel = AblationParameters(1.0, 3.0, 0.5, 2.0, "cosine")
    stored = Edit({"mlp": kernel}, "x", None, "full").to_dict()
    assert Edit.from_dict(stored).components["mlp"] == kernel
    del stored["components"]["mlp"]["shape"]
    assert Edit.from_dict(stored).components["mlp"].shape == "linear"
    with pytest.raises(ValueError, match="a kernel is one of linear, flat, cosine, gaussian, not 'round'"):
        AblationParameters(1.0, 3.0, 0.5, 2.0, "round")


@pytest.mark.parametrize("index", [0.0, 1.0, 2.4, 4.999, 5.0])
def test_global_direction_is_the_published_interpolation(index: float) -> None:
    bank = {"x": orthonormal(LAYERS + 1, 1, D)}
    low = int(index)
    high = min(low + 1, LAYERS - 1)
    share = index - low
    points = bank["x"][:, 0]
    expected = normalize((1 - share) * points[low + 1] + share * points[high + 1], dim=0)  # point 0 is the embedding
    found = directions_for(Edit({}, "x", index, "none"), bank)
    assert found.shape == (LAYERS, 1, D)
    for layer in range(LAYERS):
        torch.testing.assert_close(found[layer, 0], expected, rtol=1e-5, atol=1e-6)


def test_per_layer_direction_is_the_point_after_the_block() -> None:
    bank = {"x": orthonormal(LAYERS + 1, 2, D)}
    assert torch.equal(directions_for(Edit({}, "x", None, "none"), bank), bank["x"][1:])


def test_interpolated_subspace_is_orthonormal_and_does_not_depend_on_its_basis() -> None:
    rank = 3
    bank = orthonormal(LAYERS + 1, rank, D)
    rotated = bank.clone()
    rotated[3] = orthonormal(rank, rank, seed=5) @ bank[3]  # another basis of the same subspace
    one, two = (directions_for(Edit({}, "x", 1.5, "none"), {"x": points})[0] for points in (bank, rotated))
    torch.testing.assert_close(one @ one.T, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.T @ one, two.T @ two, rtol=0, atol=1e-5)


def test_opposite_directions_half_way_fall_back_to_one_of_them() -> None:
    bank = orthonormal(LAYERS + 1, 1, D)
    bank[3] = -bank[2]
    found = directions_for(Edit({}, "x", 1.5, "none"), {"x": bank})
    assert torch.equal(found[0], bank[3])


@pytest.mark.parametrize("mode", ["none", "pre"])
@pytest.mark.parametrize("index", [2.3, None])
def test_weights_equal_what_heretic_publishes(mode: str, index: float | None) -> None:
    """none: W - lambda v (v^T W); pre: W - lambda (rho * v) (v^T What). Kernel and direction as above."""
    bank = {"x": orthonormal(LAYERS + 1, 1, D)}
    kernel = AblationParameters(1.4, 3.6, 0.3, 2.7)
    edit = Edit({"mlp": kernel}, "x", index, mode)
    found_directions = directions_for(edit, bank)
    for layer in range(LAYERS):
        weight = random_weight(seed=layer)
        if index is None:
            v = bank["x"][layer + 1, 0]
        else:
            v = normalize(0.7 * bank["x"][3, 0] + 0.3 * bank["x"][4, 0], dim=0)
        strength = published_kernel(kernel, layer)
        rho = weight.norm(dim=1)
        if mode == "none":
            expected = weight - strength * torch.outer(v, v @ weight)
        else:
            expected = weight - strength * torch.outer(rho * v, v @ normalize(weight, dim=1))
        found = apply_to_weight(
            weight, factors([weight], found_directions[layer], edit.strength("mlp", layer), edit.norm_mode)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ----- the record -----


def test_edit_survives_json_and_pickle() -> None:
    edit = Edit({"attention": AblationParameters(1.0, 2.5, 0.1, 3.0)}, "difference_in_means@0", None, "full")
    assert Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
    assert pickle.loads(pickle.dumps(edit)) == edit
    assert edit.strength("mlp", 2) == 0.0  # a component without a kernel is not edited


def test_unknown_norm_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="none, pre, full"):
        Edit({}, "x", None, "half")  # type: ignore[arg-type]
