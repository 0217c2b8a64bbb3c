"""Directional ablation on a model: live through forward hooks, or baked into the weights.

    editor = LiveEditor(architecture)                 # hooks installed once; nothing set, nothing changed
    one, two = editor.resolve_all([edit_a, edit_b], bank)
    editor.set([one, two, None], rows=[0, 0, 1, 2])   # a batch of four: two rows under edit_a, one edit_b, one bare
    model(input_ids)
    editor.clear()

The rows of one batch may carry different edits because the direction rows of *all* edits are applied to the whole
batch in two thin matrix products, and a mask keeps each edit's projections to its own rows. So nothing of
the size of the batch is gathered per module, and ``select`` (rows that leave a batch) only cuts an index.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bruno_ray.ablation.closed_forms import (
    DirectionBank,
    Factors,
    apply_to_output,
    apply_to_weight,
    factors_from,
    mixtures,
    responses,
    row_norms,
)
from bruno_ray.ablation.edit import Edit
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

    @torch.no_grad()
    def _read_weights(
        self, i: int, writer: Writer, edits: Sequence[Edit], points_of_edit: Sequence[tuple[int, ...]]
    ) -> None:
        """Fill what these edits need of writer i: rho for `pre`, H at their bank points as well for `full`."""
        if i not in self._rho and any(edit.norm_mode != "none" for edit in edits):
            self._rho[i] = row_norms(writer.weights())
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


@dataclass
class _Tables:
    """What a hook needs for the edits that are set: all active direction rows of one writer, stacked."""

    left: Float[Tensor, "n d"]
    right: Float[Tensor, "n d"]
    edit_of_row: Int[Tensor, " n"]
    """Which edit each of the n direction rows belongs to."""

    scale: Float[Tensor, "edits+1 d"] | None
    """Per edit; the last row, for unedited batch rows, is 1."""

    bias: Float[Tensor, " d"] | None

    def to(self, device: torch.device) -> "_Tables":
        scale, bias = (None if t is None else t.to(device) for t in (self.scale, self.bias))
        return _Tables(self.left.to(device), self.right.to(device), self.edit_of_row.to(device), scale, bias)


@dataclass
class _Batch:
    """Which edit each row of the batch carries, on every device it was asked for."""

    edit_of_batch_row: Int[Tensor, " b"]
    on_device: dict[torch.device, Int[Tensor, " b"]] = field(default_factory=dict)

    def rows(self, device: torch.device) -> Int[Tensor, " b"]:
        if device not in self.on_device:
            self.on_device[device] = self.edit_of_batch_row.to(device)
        return self.on_device[device]


class LiveEditor:
    """Forward hooks on every writer of one model copy; idle until edits are set."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._resolver = Resolver(architecture)
        self._edits: list[ResolvedEdit | None] = []
        self._tables: list[_Tables | None] = [None] * len(architecture.writers)
        self._batch: _Batch | None = None
        self._handles = [
            writer.module.register_forward_hook(self._hook(i)) for i, writer in enumerate(architecture.writers)
        ]

    def resolve(self, edit: Edit, bank: DirectionBank) -> ResolvedEdit:
        return self.resolve_all([edit], bank)[0]

    def resolve_all(self, edits: Sequence[Edit], bank: DirectionBank) -> list[ResolvedEdit]:
        """Several edits at once read each weight once. See ``Resolver``."""
        return self._resolver.resolve_all(edits, bank)

    def set(self, edits: Sequence[ResolvedEdit | None], rows: Sequence[int] | Tensor) -> None:
        """From now on row b of every batch carries ``edits[rows[b]]``; None is the unedited model.

        Raises ValueError if a row names no edit.
        """
        edits = list(edits)
        rows = torch.as_tensor(rows, dtype=torch.long, device="cpu")
        if rows.ndim != 1 or len(rows) == 0 or rows.min() < 0 or rows.max() >= len(edits):
            raise ValueError(f"rows must be a non-empty list of indices into the {len(edits)} edits")
        same = len(edits) == len(self._edits) and all(a is b for a, b in zip(edits, self._edits))
        if not same:
            self._edits = edits
            self._tables = [self._stack(i, edits) for i in range(len(self._tables))]
        bare = torch.tensor([edit is None for edit in edits])
        # Unedited rows get an index of their own past the edits: no direction row belongs to it, its scale is 1.
        self._batch = None if bool(bare[rows].all()) else _Batch(torch.where(bare[rows], len(edits), rows))

    def select(self, keep: Tensor) -> None:
        """The batch now consists of these rows of it (a mask, or indices in the new order)."""
        if self._batch is None:
            return
        rows = self._batch.edit_of_batch_row[keep.cpu()]
        self._batch = _Batch(rows) if bool((rows < len(self._edits)).any()) else None

    def clear(self) -> None:
        """Back to the unedited model; the hooks stay."""
        self._batch = None

    def close(self) -> None:
        """Remove the hooks."""
        self.clear()
        for handle in self._handles:
            handle.remove()

    def _stack(self, i: int, edits: Sequence[ResolvedEdit | None]) -> _Tables | None:
        active = [(k, edit.factors[i]) for k, edit in enumerate(edits) if edit is not None and edit.factors[i]]
        if not active:
            return None
        left = torch.cat([factors.left for _, factors in active])
        scale = None
        if any(factors.scale is not None for _, factors in active):
            scale = left.new_ones(len(edits) + 1, left.shape[1])
            for k, factors in active:
                if factors.scale is not None:
                    scale[k] = factors.scale
        edit_of_row = torch.tensor([k for k, factors in active for _ in factors.left], device=left.device)
        right = torch.cat([factors.right for _, factors in active])
        return _Tables(left, right, edit_of_row, scale, self._architecture.writers[i].read_bias())

    def _hook(self, i: int):
        def edit_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            if self._batch is None or self._tables[i] is None:
                return None
            if isinstance(output, tuple):
                return (self._edited(i, output[0]), *output[1:])
            return self._edited(i, output)

        return edit_output

    def _edited(self, i: int, y: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        tables, batch = self._tables[i], self._batch
        assert tables is not None and batch is not None
        if tables.left.device != y.device:  # offloaded weights: the module runs elsewhere than it is stored
            tables = self._tables[i] = tables.to(y.device)
        rows = batch.rows(y.device)
        if y.numel() % (len(rows) * y.shape[-1]):
            raise ValueError(f"an output of shape {tuple(y.shape)} is no batch of the {len(rows)} rows that are set")
        y_BTD = y.reshape(len(rows), -1, y.shape[-1])
        member = (rows[:, None] == tables.edit_of_row)[:, None]
        scale = None if tables.scale is None else tables.scale[rows][:, None]
        return apply_to_output(y_BTD, tables.left, tables.right, scale, tables.bias, member).reshape(y.shape)


def bake(architecture: Architecture, edit: Edit | ResolvedEdit, bank: DirectionBank | None = None) -> None:
    """Write the edit into the weights: computed in float32, cast back to the stored dtype.

    `bank` is needed unless the edit is resolved. Raises ModelError for quantised or offloaded weights, before any
    weight is changed.
    """
    if isinstance(edit, Edit):
        if bank is None:
            raise ValueError("an edit that is not resolved needs its direction bank")
        edit = Resolver(architecture).resolve_all([edit], bank)[0]
    work = [(writer, factors) for writer, factors in zip(architecture.writers, edit.factors) if factors is not None]
    for writer, _ in work:
        for matrix in writer.matrices:
            matrix.check_writable()
    for writer, factors in work:
        for matrix in writer.matrices:
            matrix.write(apply_to_weight(matrix.read(), factors.to(matrix.device)))
