"""Keys and values of a batch whose rows come and go.

All rows share one time axis: the newest token of every row lies in column hi - 1, and row b occupies the columns
[hi - length_b, hi). So one 2-D mask says what a row sees, sliding windows and positions come out right, a step writes
one column, and the attention of a step reads one view:

    columns   lo                     hi      capacity
    row 0     x x x x x x x x x x x x .......         the longest row begins at lo
    row 1     . . . . . x x x x x x x .......
    row 2     . . . . . . . . . x x x .......

Rows that join were read apart, into a cache of their own (``prefill_cache``); their columns are copied in. When hi
reaches the end everything slides back. Layers with linear attention have one state per row and no columns: rows join
by concatenation. Sliding windows keep all their tokens here and leave the window to the mask.

Axes: B rows, P joining rows, H heads, T columns, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from bruno_ray.errors import ModelError
from bruno_ray.generation.decoding import BufferedLayer

RESERVE = 16  # free columns that every row must have before it is let in
MIN_SLACK, SLACK_SHARE = 64, 4  # a new buffer has at least so many free columns, and 1 / SLACK_SHARE of its width

KNOWN = {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"}
"""Kinds of layers of a cache, by name: transformers 5.20 has not the last, of layers that keep nothing."""


@dataclass
class Window:
    """What of the buffers is in use; shared by all layers."""

    rows: int = 0
    lo: int = 0
    hi: int = 0

    @property
    def width(self) -> int:
        return self.hi - self.lo


class SlotLayer(DynamicLayer):
    """One attention layer: a slot per row, with the columns of ``Window``."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (B, H, 1, D) into column hi; returns views of all columns with it. The window moves afterwards, once
        for all layers, so a step that failed half-way can be run again."""
        window, end = self._window, self._window.hi + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states)):
            buffer[: window.rows, :, window.hi : end] = states
        keys, values = (buffer[: window.rows, :, window.lo : end] for buffer in self._buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self._window.width

    def allocate(self, rows: int, columns: int, like: DynamicLayer, new_hi: int) -> None:
        """A buffer of (rows, H, columns, D), zeroed (masked columns count 0 times what is there), with all so far."""
        old, self._buffers = self._buffers or [None, None], []
        window = self._window
        for i, states in enumerate((like.keys, like.values) if old[0] is None else old):
            buffer = states.new_zeros(rows, states.shape[1], columns, states.shape[-1])
            if old[i] is not None and window.rows:
                held = old[i][: window.rows, :, window.lo : window.hi]
                buffer[: window.rows, :, new_hi - window.width : new_hi] = held
                old[i] = None
            self._buffers.append(buffer)
        self.is_initialized = True

    def slide(self, new_hi: int) -> None:
        window = self._window
        for buffer in self._buffers:
            held = buffer[: window.rows, :, window.lo : window.hi].clone()
            buffer[: window.rows, :, new_hi - window.width : new_hi] = held

    def place(self, joiners: DynamicLayer, rows: Tensor | None) -> None:
        """Copy the rows of a prefill cache into the free slots behind the window's rows, so that they end at hi."""
        for buffer, states in zip(self._buffers, (joiners.keys, joiners.values)):
            states = states if rows is None else states.index_select(0, rows.to(states.device))
            first, last = self._window.rows, self._window.rows + len(states)
            buffer[first:last, :, self._window.hi - states.shape[-2] : self._window.hi] = states

    def move(self, source: int, target: int) -> None:
        columns = slice(self._window.lo, self._window.hi)
        for buffer in self._buffers:
            buffer[target, :, columns] = buffer[source, :, columns]

    def scrub(self, row: int) -> None:
        for buffer in self._buffers:
            buffer[row].zero_()


class BatchCache:
    """The cache of the running rows: ``cache`` goes to the model, the rest is for whoever lets rows in and out.

    Raises ModelError for families with layers that cannot be kept this way.
    """

    def __init__(self, config: PreTrainedConfig, max_rows: int) -> None:
        self.window = Window()
        self.lengths: list[int] = []
        """Columns of each row."""

        self.kv_tokens = 0
        """Limit of rows x columns."""

        self._max_rows = max_rows
        self._config = config
        self.reset()

    def reset(self) -> None:
        """No row, no buffer."""
        self._capacity = (0, 0)
        self.window.rows = self.window.lo = self.window.hi = 0
        self.lengths = []
        self.cache = DynamicCache(config=self._config)
        self.cache.layers = [
            SlotLayer(self.window) if _grows(layer) else layer for layer in _known(self.cache.layers, self._config)
        ]
        self._slots = [layer for layer in self.cache.layers if isinstance(layer, SlotLayer)]

    # ----- room -----

    def fits(self, rows: int, width: int) -> bool:
        return rows <= self._max_rows and rows * (width + RESERVE) <= self.kv_tokens

    def make_room(self, joiners: int = 0, width: int = 0, like: DynamicCache | None = None) -> None:
        """A free column, free slots for so many joiners, and columns for their width. Call it if ``fits``.

        ``like`` shows the shapes; needed the first time.
        """
        rows, width = self.window.rows + joiners, max(width, self.window.width)
        n_slots, n_columns = self._capacity
        if rows <= n_slots and width <= self.window.hi < n_columns:
            return
        if rows <= n_slots and width + max(RESERVE, width // SLACK_SHARE) <= n_columns:
            for layer in self._slots:
                layer.slide(width)
        else:
            # Slots grow in powers of two, unless only the exact number leaves room for the columns.
            n_slots = min(self._max_rows, max(n_slots, 1 << (rows - 1).bit_length()))
            wanted = width + max(MIN_SLACK, 2 * width // SLACK_SHARE)
            if n_slots * wanted > self.kv_tokens:
                n_slots = rows
            n_columns = max(width + 1, min(wanted, self.kv_tokens // n_slots))
            prototypes = self.cache.layers if like is None else like.layers
            for layer, prototype in zip(self.cache.layers, prototypes):
                if isinstance(layer, SlotLayer):
                    layer.allocate(n_slots, n_columns, prototype, width)
            self._capacity = (n_slots, n_columns)
        self.window.lo, self.window.hi = width - self.window.width, width

    # ----- rows -----

    def join(self, prefill: DynamicCache, lengths: Sequence[int], rows: Tensor | None = None) -> None:
        """Let the rows of a prefill cache in, or those of them that ``rows`` says; lengths are of those let in."""
        self.make_room(len(lengths), prefill.get_seq_length(), prefill)
        for layer, joiners in zip(self.cache.layers, prefill.layers):
            if isinstance(layer, SlotLayer):
                layer.place(joiners, rows)
            elif isinstance(layer, LinearAttentionLayer):
                _join_states(layer, joiners, rows)
        self.lengths += lengths
        self.window.rows += len(lengths)
        self._fit_window()

    def leave(self, leaving: set[int], broken: Sequence[int] = ()) -> list[int]:
        """Take rows out; the last ones fill the gaps. Returns the new order: which old row each new one was.

        What ``broken`` rows (part of ``leaving``) hold is not a number, and is wiped out.
        """
        n_kept = self.window.rows - len(leaving)
        order = list(range(n_kept))
        movers = [row for row in range(n_kept, self.window.rows) if row not in leaving]
        for layer in self._slots:
            for row in broken:
                layer.scrub(row)
        for target, source in zip(sorted(row for row in leaving if row < n_kept), movers):
            order[target] = source
            for layer in self._slots:
                layer.move(source, target)
        for layer in self.cache.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(torch.tensor(order, dtype=torch.long))
        self.lengths = [self.lengths[row] for row in order]
        self.window.rows = n_kept
        self._fit_window()
        return order

    def advance(self) -> None:
        """Every row has one token more."""
        self.lengths = [length + 1 for length in self.lengths]
        self.window.hi += 1

    def _fit_window(self) -> None:
        self.window.lo = self.window.hi - max(self.lengths, default=0)


def prefill_cache(config: PreTrainedConfig, n_tokens: int) -> DynamicCache:
    """An empty cache for rows that are read apart, with room for so many tokens each."""
    cache = DynamicCache(config=config)
    cache.layers = [BufferedLayer(n_tokens) if _grows(layer) else layer for layer in _known(cache.layers, config)]
    return cache


def _grows(layer: object) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _known(layers: list, config: PreTrainedConfig) -> list:
    strange = {type(layer).__name__ for layer in layers} - KNOWN
    if strange or not any(map(_grows, layers)):
        what = ", ".join(sorted(strange)) or "no attention layer"
        raise ModelError(
            f"models of type {config.model_type} cannot be served yet (their cache has {what}): save the edited"
            " model and serve it with another server, such as vLLM"
        )
    return layers


def _join_states(layer: LinearAttentionLayer, joiners: LinearAttentionLayer, rows: Tensor | None) -> None:
    if rows is not None:
        joiners.reorder_cache(rows)
    for i in range(joiners.number_of_states):
        for held, new, known in (
            (layer.conv_states, joiners.conv_states, layer.is_conv_states_initialized),
            (layer.recurrent_states, joiners.recurrent_states, layer.is_recurrent_states_initialized),
        ):
            if new[i] is not None:
                held[i] = torch.cat([held[i], new[i]]) if known[i] else new[i]
    layer.is_conv_states_initialized = dict(joiners.is_conv_states_initialized)
    layer.is_recurrent_states_initialized = dict(joiners.is_recurrent_states_initialized)
    layer.has_previous_state = dict(joiners.has_previous_state)
    layer.conv_kernel_size = dict(joiners.conv_kernel_size)
    layer.device, layer.dtype = joiners.device, joiners.dtype
