"""An edit and a bank become the small tensors that a module's output, input or weight is edited with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bruno_ray.ablation.closed_forms import (
    DirectionBank,
    Factors,
    added,
    factors_from,
    mixtures,
    responses,
    row_norms,
    seen_through,
    shifts_of,
)
from bruno_ray.ablation.edit import ADDITION, PART_NAMES, Edit, NormMode
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.readers import Reader, gain
from bruno_ray.model.writers import Matrix, Writer

Part = tuple[int, ...] | None


@dataclass(frozen=True)
class ResolvedEdit:
    """An edit worked out for one model copy: factors per writer, then per reader; None where nothing is changed."""

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
        self._readers = architecture.readers
        self._rho: dict[tuple[int, Part], Float[Tensor, " d"]] = {}
        self._banks: dict[str, Tensor] = {}
        self._responses: dict[tuple[str, int, int, Part], Float[Tensor, "r d"]] = {}
        self._gains: dict[int, tuple[Float[Tensor, " d"], bool]] = {}

    def resolve_all(self, edits: Sequence[Edit], bank: DirectionBank) -> list[ResolvedEdit]:
        """All edits at once, so that a weight that must be read (and dequantised) is read once for all of them.

        Raises ModelError for an edit with a component that this model has no place for.
        """
        for edit in edits:
            self._require_places(edit)
        for name in {edit.direction_set for edit in edits}:
            if self._banks.get(name) is not bank[name]:
                self._banks[name] = bank[name]
                self._responses = {key: value for key, value in self._responses.items() if key[0] != name}
        layers = [mixtures(edit, bank[edit.direction_set]) for edit in edits]
        factors: list[list[Factors | None]] = [[] for _ in edits]
        for i, writer in enumerate(self._writers):
            strengths = [edit.strength(writer.component, writer.layer) for edit in edits]
            parts = [part_of(edit, writer) for edit in edits]
            active = [k for k in range(len(edits)) if strengths[k] != 0 and parts[k] != ()]
            self._read_weights(
                i,
                writer,
                [edits[k] for k in active],
                [parts[k] for k in active],
                [layers[k][writer.layer].points for k in active],
            )
            for k, edit in enumerate(edits):
                found = None
                if k in active:
                    name, mix = edit.direction_set, layers[k][writer.layer]
                    directions = mix.of([bank[name][point].float().cpu() for point in mix.points])
                    response = None
                    if edit.norm_mode == "full":
                        response = mix.of([self._responses[name, point, i, parts[k]] for point in mix.points])
                    rho = self._rho.get((i, parts[k]))
                    found = factors_from(directions, strengths[k], edit.norm_mode, rho, response)
                added_with = edit.strength(ADDITION, writer.layer) if takes_addition(writer) else 0.0
                if added_with != 0:
                    found = added(found, shifts_of(edit, bank)[writer.layer + 1, 0].float().cpu(), added_with)
                factors[k].append(None if found is None else found.to(writer.device))
        for reader in self._readers:
            for k, edit in enumerate(edits):
                strength = edit.strength(reader.component, reader.layer)
                if strength == 0:
                    factors[k].append(None)
                    continue
                mix = layers[k][reader.layer]
                directions = mix.of([bank[edit.direction_set][point].float().cpu() for point in mix.points])
                seen = seen_through(directions, *self._gain(reader))
                factors[k].append(factors_from(seen, strength, "none").to(reader.device))
        return [ResolvedEdit(edit, tuple(of_edit)) for edit, of_edit in zip(edits, factors)]

    def _require_places(self, edit: Edit) -> None:
        for writer in self._writers if edit.parts else ():
            chosen = edit.parts.get(writer.component, (None,) * (writer.layer + 1))
            part = chosen[writer.layer] if writer.layer < len(chosen) else (writer.n_parts,)
            if writer.n_parts and part and max(part) >= writer.n_parts:
                raise ModelError(
                    f"the edit is of {PART_NAMES[writer.component]} that {writer.name} does not have: choose an edit"
                    " that was found on this model"
                )
        for component in edit.further:
            if edit.components[component].is_nothing:
                continue
            if component == ADDITION:
                there = any(takes_addition(writer) for writer in self._writers)
            else:
                there = any(reader.component == component for reader in self._readers)
            if not there:
                raise ModelError(
                    f"the edit has the component {component}, which this model has no place for: choose an edit without"
                    " it, or the model that it was found on"
                )

    def _gain(self, reader: Reader) -> tuple[Float[Tensor, " d"], bool]:
        if id(reader.norm) not in self._gains:
            self._gains[id(reader.norm)] = gain(reader.norm, reader.matrices[0].d_model)
        return self._gains[id(reader.norm)]

    def factors(self, i: int, directions: Float[Tensor, "r d"], strength: Tensor, norm_mode: NormMode) -> Factors:
        """Of writer i, from directions and a strength (on the CPU) that gradients may flow back to. `full` reads the
        weight each time. Raises ModelError if it cannot be read."""
        writer = self._writers[i]
        rho = None if norm_mode == "none" else self._row_norms(i, None)
        response = None
        if norm_mode == "full" and rho is not None:
            response = responses(writer.weights(), rho, directions.to(writer.device)).cpu()
        return factors_from(directions, strength, norm_mode, rho, response).to(writer.device)

    @torch.no_grad()
    def _row_norms(self, i: int, part: Part) -> Float[Tensor, " d"]:
        if (i, part) not in self._rho:
            self._rho[i, part] = row_norms(self._writers[i].weights(part))
        return self._rho[i, part]

    @torch.no_grad()
    def _read_weights(
        self,
        i: int,
        writer: Writer,
        edits: Sequence[Edit],
        parts: Sequence[Part],
        points_of_edit: Sequence[tuple[int, ...]],
    ) -> None:
        """Fill what these edits need of writer i: rho for `pre`, H at their bank points as well for `full`."""
        for part in dict.fromkeys(part for edit, part in zip(edits, parts) if edit.norm_mode != "none"):
            rho = self._row_norms(i, part)
            wanted = {
                (edit.direction_set, point, i, part)
                for edit, mine, points in zip(edits, parts, points_of_edit)
                if edit.norm_mode == "full" and mine == part
                for point in points
            }
            missing = sorted(wanted - self._responses.keys(), key=lambda key: key[:2])
            if missing:
                rows = [self._banks[name][point].float().cpu() for name, point, *_ in missing]
                found = responses(writer.weights(part), rho, torch.cat(rows).to(writer.device)).cpu()
                self._responses.update(zip(missing, found.split([len(row) for row in rows])))


def takes_addition(writer: Writer) -> bool:
    """Whether an addition is baked into the bias of this writer: those of attention's output projections."""
    return writer.component == "attention" and writer.bias is not None


def part_of(edit: Edit, writer: Writer) -> Part:
    """The experts or heads of a writer that are edited; None is all, whatever it consists of."""
    part = edit.part(writer.component, writer.layer) if writer.n_parts else None
    return None if part is not None and len(part) == writer.n_parts else part


def matrices_of(edit: Edit, site: Writer | Reader) -> list[tuple[Matrix, list[int] | None]]:
    """The matrices of a site that an edit changes where it has factors, each with the columns (None: all)."""
    if isinstance(site, Writer):
        return site.chosen(part_of(edit, site))
    return [(matrix, None) for matrix in site.matrices]
