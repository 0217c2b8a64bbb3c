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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bruno_ray.ablation.closed_forms import DirectionBank, Factors, apply_to_output
from bruno_ray.ablation.edit import Edit, NormMode
from bruno_ray.ablation.resolving import ResolvedEdit, Resolver
from bruno_ray.model.architectures import Architecture


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

    offset: Float[Tensor, "edits+1 d"] | None = None
    """Per edit; the last row, for unedited batch rows, is 0."""

    def to(self, device: torch.device) -> "_Tables":
        scale, bias, offset = (None if t is None else t.to(device) for t in (self.scale, self.bias, self.offset))
        left, right, edit_of_row = (t.to(device) for t in (self.left, self.right, self.edit_of_row))
        return _Tables(left, right, edit_of_row, scale, bias, offset)


@dataclass
class _Batch:
    """Which edit each row of the batch carries, on every device it was asked for."""

    edit_of_batch_row: Int[Tensor, " b"]
    only: int | None = None
    """The edit of all rows, where no other edit is set: its tables need no mask then, and nothing per row."""

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

    def factors(self, i: int, directions: Float[Tensor, "r d"], strength: Tensor, norm_mode: NormMode) -> Factors:
        """Of writer i, with gradients. See ``Resolver``."""
        return self._resolver.factors(i, directions, strength, norm_mode)

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
        self._batch = self._batch_of(torch.where(bare[rows], len(edits), rows))

    def select(self, keep: Tensor) -> None:
        """The batch now consists of these rows of it (a mask, or indices in the new order)."""
        if self._batch is None:
            return
        self._batch = self._batch_of(self._batch.edit_of_batch_row[keep.cpu()])

    def clear(self) -> None:
        """Back to the unedited model; the hooks stay."""
        self._batch = None

    def close(self) -> None:
        """Remove the hooks."""
        self.clear()
        for handle in self._handles:
            handle.remove()

    def _batch_of(self, rows: Int[Tensor, " b"]) -> _Batch | None:
        """None if no row is edited."""
        used, n_set = rows.unique().tolist(), sum(edit is not None for edit in self._edits)
        if used in ([], [len(self._edits)]):
            return None
        return _Batch(rows, used[0] if len(used) == n_set == 1 else None)

    def _stack(self, i: int, edits: Sequence[ResolvedEdit | None]) -> _Tables | None:
        of_edit = [(k, edit.factors[i]) for k, edit in enumerate(edits) if edit is not None]
        active = [(k, factors) for k, factors in of_edit if factors is not None]
        if not active:
            return None
        left = torch.cat([factors.left for _, factors in active])
        scale = _by_edit({k: f.scale for k, f in active if f.scale is not None}, 1.0, len(edits))
        offset = _by_edit({k: f.offset for k, f in active if f.offset is not None}, 0.0, len(edits))
        edit_of_row = torch.tensor([k for k, factors in active for _ in factors.left], device=left.device)
        right = torch.cat([factors.right for _, factors in active])
        return _Tables(left, right, edit_of_row, scale, self._architecture.writers[i].read_bias(), offset)

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
        parts = self._architecture.writers[i].stacked
        if parts > 1:  # (parts, B, T, d): rows of one edit lie apart, and are brought together
            y = y.reshape(parts, len(rows), -1, y.shape[-1]).transpose(0, 1)
        y_BTD = y.reshape(len(rows), -1, y.shape[-1])
        if batch.only is None:
            member = (rows[:, None] == tables.edit_of_row)[:, None]
            scale, offset = (None if t is None else t[rows][:, None] for t in (tables.scale, tables.offset))
        else:
            member = None
            scale, offset = (None if t is None else t[batch.only] for t in (tables.scale, tables.offset))
        edited_BTD = apply_to_output(y_BTD, tables.left, tables.right, scale, tables.bias, member, offset)
        edited = edited_BTD.reshape(y.shape)
        return edited.transpose(0, 1).reshape(-1, y.shape[-1]) if parts > 1 else edited


def _by_edit(given: Mapping[int, Float[Tensor, " d"]], other: float, n_edits: int) -> Float[Tensor, "edits+1 d"] | None:
    """What some edits have, and ``other`` for the rest and for unedited rows; None if no edit has any."""
    if not given:
        return None
    neutral = torch.full_like(next(iter(given.values())), other)
    return torch.stack([given.get(k, neutral) for k in range(n_edits + 1)])
