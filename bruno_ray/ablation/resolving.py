"""An edit and a bank become the small tensors that a module's output or weight is edited with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.ablation.closed_forms import (
    DirectionBank,
    Factors,
    factors_from,
    mixtures,
    responses,
    row_norms,
)
from bruno_ray.ablation.edit import Edit, NormMode
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.writers import Writer


@dataclass(frozen=True)
class ResolvedEdit:
    """An edit worked out for one model copy: factors per writer, None where the strength is 0."""

    edit: Edit
    factors: tuple[Factors | None, ...]


class Resolver:
    """Works edits out against one model's weights, remembering (on the CPU) what a weight had to be read for.

    Row norms are kept per writer. For `full` edits H (see ``ablation``) is kept per writer and bank point, so after
    the first few edits of a study no weight is read again. Kept values assume that neither the weights nor a bank
    tensor change in place; another bank tensor under the same name is noticed.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._writers = architecture.writers
        self._rho: dict[int, Float[Tensor, " d"]] = {}
        self._banks: dict[str, Tensor] = {}
        self._responses: dict[tuple[str, int, int], Float[Tensor, "r d"]] = {}

    def resolve_all(self, edits: Sequence[Edit], bank: DirectionBank) -> list[ResolvedEdit]:
        """All edits at once, so that a weight that must be read (and dequantised) is read once for all of them."""
        for name in {edit.direction_set for edit in edits}:
            if self._banks.get(name) is not bank[name]:
                self._banks[name] = bank[name]
                self._responses = {key: value for key, value in self._responses.items() if key[0] != name}
        layers = [mixtures(edit, bank[edit.direction_set]) for edit in edits]
        factors: list[list[Factors | None]] = [[] for _ in edits]
        for i, writer in enumerate(self._writers):
            strengths = [edit.strength(writer.component, writer.layer) for edit in edits]
            active = [k for k, strength in enumerate(strengths) if strength != 0]
            self._read_weights(i, writer, [edits[k] for k in active], [layers[k][writer.layer].points for k in active])
            for k, edit in enumerate(edits):
                if strengths[k] == 0:
                    factors[k].append(None)
                    continue
                name, mix = edit.direction_set, layers[k][writer.layer]
                directions = mix.of([bank[name][point].float().cpu() for point in mix.points])
                response = None
                if edit.norm_mode == "full":
                    response = mix.of([self._responses[name, point, i] for point in mix.points])
                found = factors_from(directions, strengths[k], edit.norm_mode, self._rho.get(i), response)
                factors[k].append(found.to(writer.device))
        return [ResolvedEdit(edit, tuple(of_edit)) for edit, of_edit in zip(edits, factors)]

    def factors(self, i: int, directions: Float[Tensor, "r d"], strength: Tensor, norm_mode: NormMode) -> Factors:
        """Of writer i, from directions and a strength (on the CPU) that gradients may flow back to. `full` reads the
        weight each time. Raises ModelError if it cannot be read."""
        writer = self._writers[i]
        rho = None if norm_mode == "none" else self._row_norms(i)
        response = None
        if norm_mode == "full" and rho is not None:
            response = responses(writer.weights(), rho, directions.to(writer.device)).cpu()
        return factors_from(directions, strength, norm_mode, rho, response).to(writer.device)

    @torch.no_grad()
    def _row_norms(self, i: int) -> Float[Tensor, " d"]:
        if i not in self._rho:
            self._rho[i] = row_norms(self._writers[i].weights())
        return self._rho[i]

    @torch.no_grad()
    def _read_weights(
        self, i: int, writer: Writer, edits: Sequence[Edit], points_of_edit: Sequence[tuple[int, ...]]
    ) -> None:
        """Fill what these edits need of writer i: rho for `pre`, H at their bank points as well for `full`."""
        if any(edit.norm_mode != "none" for edit in edits):
            self._row_norms(i)
        wanted = {
            (edit.direction_set, point, i)
            for edit, points in zip(edits, points_of_edit)
            if edit.norm_mode == "full"
            for point in points
        }
        missing = sorted(wanted - self._responses.keys())
        if missing:
            rows = [self._banks[name][point].float().cpu() for name, point, _ in missing]
            found = responses(writer.weights(), self._rho[i], torch.cat(rows).to(writer.device)).cpu()
            self._responses.update(zip(missing, found.split([len(row) for row in rows])))
