"""Batches cover every row once under the budget, shrink when memory runs out, and pad on the left."""

import random

import pytest
import torch

from bruno_ray.errors import ModelError
from bruno_ray.model.batching import TokenBudget, batches, map_batches, pad_left, run_with_backoff


@pytest.mark.parametrize("tokens", [1, 64, 300, 10_000])
def test_every_row_once_and_never_more_than_the_budget(tokens):
    lengths = [random.Random(7).randint(1, 200) for _ in range(50)]
    seen = []
    for rows in batches(lengths, TokenBudget(tokens)):
        padded = len(rows) * max(lengths[row] for row in rows)
        assert padded <= tokens or len(rows) == 1
        seen += rows
    assert sorted(seen) == list(range(50))


def test_sorting_by_length_pads_less_than_the_given_order():
    lengths = [10, 200] * 20
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches(lengths, TokenBudget(400)))
    assert padded == sum(lengths)  # 400 tokens hold two long or forty short rows: none is mixed


def test_no_rows_no_batches():
    assert list(batches([], TokenBudget(10))) == []


class SmallDevice:
    """Runs a batch if its tokens fit, as a GPU does."""

    def __init__(self, capacity: int, lengths: list[int]) -> None:
        self.capacity, self.lengths, self.calls = capacity, lengths, []

    def __call__(self, rows: list[int]) -> list[int]:
        self.calls.append(len(rows))
        if len(rows) * max(self.lengths[row] for row in rows) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * row for row in rows]


def test_out_of_memory_halves_the_budget_and_loses_no_row():
    lengths = [10] * 40
    device, budget = SmallDevice(100, lengths), TokenBudget(400)
    results = {row: value for rows, out in map_batches(device, lengths, budget) for row, value in zip(rows, out)}
    assert results == {row: 10 * row for row in range(40)}
    assert budget.tokens == 100
    assert device.calls == [40, 20, 10, 10, 20, 10, 10]  # one batch was split, in order


def test_a_lowered_budget_holds_for_the_batches_after():
    lengths = [10] * 80
    device, budget = SmallDevice(100, lengths), TokenBudget(200)
    assert sum(len(rows) for rows, _ in map_batches(device, lengths, budget)) == 80
    assert device.calls == [20] + [10] * 8


def test_one_row_that_does_not_fit_is_an_error_that_says_so():
    with pytest.raises(ModelError, match="one prompt of 500 tokens"):
        list(map_batches(SmallDevice(100, [500]), [500], TokenBudget(1000)))


def test_other_errors_are_not_taken_for_lack_of_memory():
    def broken(rows: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(run_with_backoff(broken, [0, 1], [3, 3], TokenBudget(100)))


def test_the_cpu_allocators_error_counts_as_lack_of_memory():
    attempts = []

    def allocate(rows: list[int]) -> int:
        attempts.append(rows)
        if len(rows) > 1:
            torch.empty(2**56)  # more than any address space: the real message of the real allocator
        return len(rows)

    assert [out for _, out in run_with_backoff(allocate, [0, 1], [3, 3], TokenBudget(100))] == [1, 1]
    assert attempts == [[0, 1], [0], [1]]


def test_the_budget_doubles_while_throughput_improves_and_then_steps_back():
    budget = TokenBudget(100, growing=True)
    budget.observe(100, 1.0)
    budget.observe(200, 1.2)  # 167 tokens a second: worth it
    assert budget.tokens == 400
    budget.observe(400, 2.3)  # 174: not worth twice the memory
    assert (budget.tokens, budget.growing) == (200, False)
    budget.observe(200, 0.1)
    assert budget.tokens == 200


def test_a_batch_that_was_not_full_teaches_nothing():
    budget = TokenBudget(100, growing=True)
    budget.observe(50, 1e-6)
    assert budget.tokens == 100 and budget.growing


def test_growth_stops_at_the_maximum():
    budget = TokenBudget(100, growing=True, maximum=150)
    budget.observe(100, 1.0)
    assert (budget.tokens, budget.growing) == (100, False)


def test_a_cpu_budget_does_not_depend_on_the_clock():
    assert not TokenBudget.for_device("cpu").growing
    assert TokenBudget.for_device("cpu", 77).tokens == 77


def test_left_padding_ends_every_prompt_in_the_last_column():
    batch = pad_left([[5, 6, 7], [8]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
