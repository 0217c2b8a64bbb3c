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
from bruno_ray.ablation.resolving import ResolvedEdit, Resolver, part_of
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.writers import Writer


@dataclass
class _Tables:
    """What a hook needs for the edits that are set: all active direction rows of one writer or reader, stacked."""

    left: Float[Tensor, "n d"]
    right: Float[Tensor, "n d"]
    edit_of_row: Int[Tensor, " n"]
    """Which edit each of the n direction rows belongs to."""

    scale: Float[Tensor, "edits+1 d"] | None
    """Per edit; the last row, for unedited batch rows, is 1."""

    bias: Float[Tensor, " d"] | None

    offset: Float[Tensor, "edits+1 d"] | None = None
    """Per edit; the last row, for unedited batch rows, is 0."""

    chosen: Float[Tensor, "edits+1 parts"] | None = None
    """Per edit 1 for each expert or head that it edits, else 0; None where every edit takes all."""

    def to(self, device: torch.device) -> "_Tables":
        optional = (self.scale, self.bias, self.offset, self.chosen)
        left, right, edit_of_row = (t.to(device) for t in (self.left, self.right, self.edit_of_row))
        return _Tables(left, right, edit_of_row, *(None if t is None else t.to(device) for t in optional))


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
    """Forward hooks on every writer of one model copy; idle until edits are set. Readers get theirs with the first edit
    of what they read."""

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._resolver = Resolver(architecture)
        self._edits: list[ResolvedEdit | None] = []
        self._tables: list[_Tables | None] = [None] * len(architecture.sites)
        self._inputs_edited = False
        self._reading = False
        self._batch: _Batch | None = None
        self._handles = [
            writer.module.register_forward_hook(self._hook(i)) for i, writer in enumerate(architecture.writers)
        ]

    @property
    def edits_inputs(self) -> bool:
        """Whether an edit that is set changes what modules read: a forward pass must call them as modules then."""
        return self._batch is not None and self._inputs_edited

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
            self._hook_readers()
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

    def _hook_readers(self) -> None:
        """Once, when the first edit asks for it: until then a forward pass may leave the modules out."""
        readers = self._architecture.readers
        first = len(self._tables) - len(readers)
        self._inputs_edited = any(tables is not None for tables in self._tables[first:])
        if self._reading or not self._inputs_edited:
            return
        self._reading = True
        self._handles += [
            reader.module.register_forward_pre_hook(self._input_hook(first + i)) for i, reader in enumerate(readers)
        ]

    def _stack(self, i: int, edits: Sequence[ResolvedEdit | None]) -> _Tables | None:
        given = [(k, edit) for k, edit in enumerate(edits) if edit is not None]
        # Edits in training have factors for writers only.
        of_edit = [(k, edit.factors[i] if i < len(edit.factors) else None) for k, edit in given]
        active = [(k, factors) for k, factors in of_edit if factors is not None]
        if not active:
            return None
        left = torch.cat([factors.left for _, factors in active])
        scale = _by_edit({k: f.scale for k, f in active if f.scale is not None}, 1.0, len(edits))
        offset = _by_edit({k: f.offset for k, f in active if f.offset is not None}, 0.0, len(edits))
        edit_of_row = torch.tensor([k for k, factors in active for _ in factors.left], device=left.device)
        right = torch.cat([factors.right for _, factors in active])
        site = self._architecture.sites[i]
        if not isinstance(site, Writer):
            return _Tables(left, right, edit_of_row, scale, None, offset)
        parts = {k: part_of(edit.edit, site) for k, edit in given if any(k == number for number, _ in active)}
        chosen = None
        if any(part is not None for part in parts.values()):
            chosen = torch.zeros(len(edits) + 1, site.n_parts, device=left.device)
            for k, part in parts.items():
                chosen[k, list(range(site.n_parts)) if part is None else list(part)] = 1
        return _Tables(left, right, edit_of_row, scale, site.read_bias(), offset, chosen)

    def _hook(self, i: int):
        def edit_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            if self._batch is None or self._tables[i] is None:
                return None
            if isinstance(output, tuple):
                return (self._edited_output(i, args, output[0]), *output[1:])
            return self._edited_output(i, args, output)

        return edit_output

    def _input_hook(self, i: int):
        def edit_input(module: nn.Module, args: tuple) -> tuple | None:
            if self._batch is None or self._tables[i] is None:
                return None
            return (self._edited(args[0], self._on(i, args[0].device), None), *args[1:])

        return edit_input

    def _on(self, i: int, device: torch.device) -> _Tables:
        tables = self._tables[i]
        assert tables is not None
        if tables.left.device != device:  # offloaded weights: the module runs elsewhere than it is stored
            tables = self._tables[i] = tables.to(device)
        return tables

    def _edited_output(self, i: int, args: tuple, y: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        tables, writer = self._on(i, y.device), self._architecture.writers[i]
        if tables.chosen is not None:
            written = self._written_by(tables.chosen, writer, args)
            if tables.bias is not None:
                written = written - tables.bias
            change = self._edited(written, tables, None) - written
            return (y.to(written.dtype) + change).to(y.dtype)
        if writer.stacked == 1:
            return self._edited(y, tables, tables.bias)
        # (parts, B, T, d): rows of one edit lie apart, and are brought together
        y_BPTd = y.reshape(writer.stacked, self._n_rows(), -1, y.shape[-1]).transpose(0, 1)
        return self._edited(y_BPTd, tables, tables.bias).transpose(0, 1).reshape(-1, y.shape[-1])

    def _written_by(self, chosen: Float[Tensor, "edits+1 parts"], writer: Writer, args: tuple) -> Tensor:
        """What the experts or heads write that each row's edit takes, and the module's bias: float32.

        The module computes once more, without those that are left out. Raises ModelError for experts that are called in
        a way which is not known here.
        """
        assert self._batch is not None
        x, chosen_BP = args[0], chosen[self._batch.rows(args[0].device)]
        forward = writer.module.forward  # not the module: its hooks would be called again
        if writer.heads:
            blocks = x.reshape(len(chosen_BP), -1, writer.heads, x.shape[-1] // writer.heads)
            return forward((blocks * chosen_BP[:, None, :, None].to(x.dtype)).reshape(x.shape)).float()
        index_NK, weights_NK = routing_of(writer, args)
        n_tokens = len(index_NK) // len(chosen_BP)
        kept_NP = chosen_BP.repeat_interleave(n_tokens, 0)
        kept_NK = kept_NP.gather(1, index_NK.clamp(max=writer.experts - 1))
        return forward(x, index_NK, weights_NK * kept_NK.to(weights_NK.dtype)).float()

    def _n_rows(self) -> int:
        assert self._batch is not None
        return len(self._batch.edit_of_batch_row)

    def _edited(
        self, y: Float[Tensor, "... d"], tables: _Tables, bias: Float[Tensor, " d"] | None
    ) -> Float[Tensor, "... d"]:
        batch = self._batch
        assert batch is not None
        rows = batch.rows(y.device)
        if y.numel() % (len(rows) * y.shape[-1]):
            raise ValueError(f"an output of shape {tuple(y.shape)} is no batch of the {len(rows)} rows that are set")
        y_BTD = y.reshape(len(rows), -1, y.shape[-1])
        if batch.only is None:
            member = (rows[:, None] == tables.edit_of_row)[:, None]
            scale, offset = (None if t is None else t[rows][:, None] for t in (tables.scale, tables.offset))
        else:
            member = None
            scale, offset = (None if t is None else t[batch.only] for t in (tables.scale, tables.offset))
        return apply_to_output(y_BTD, tables.left, tables.right, scale, bias, member, offset).reshape(y.shape)


def routing_of(writer: Writer, args: tuple) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """For each token the experts that it is sent to, and their weights, out of what the experts' module is given.

    Raises ModelError if these are not what it is given.
    """
    if len(args) == 3 and all(isinstance(arg, Tensor) for arg in args):
        _, index, weights = args
        if not index.is_floating_point() and index.ndim == 2 and index.shape == weights.shape:
            return index, weights
    raise ModelError(
        f"{writer.name} ({type(writer.module).__name__}) is called in a way that does not show which experts a token is"
        " sent to: edit all of them (search.experts all)"
    )


def _by_edit(given: Mapping[int, Float[Tensor, " d"]], other: float, n_edits: int) -> Float[Tensor, "edits+1 d"] | None:
    """What some edits have, and ``other`` for the rest and for unedited rows; None if no edit has any."""
    if not given:
        return None
    neutral = torch.full_like(next(iter(given.values())), other)
    return torch.stack([given.get(k, neutral) for k in range(n_edits + 1)])
