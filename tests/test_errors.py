"""How errors are worded, and what is said of other libraries' errors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bruno_ray
from bruno_ray import errors
from bruno_ray.errors import LONGEST_LINE, BrunoError, first_line
from bruno_ray.model.batching import is_out_of_memory
from bruno_ray.model.loading_errors import explained, named
from bruno_ray.settings import ModelSettings


def test_the_first_line_that_says_something() -> None:
    assert first_line(ValueError("\n  it is broken.\nand more\n")) == "it is broken"
    assert first_line(KeyError("x")) == "'x'" and named(KeyError("x")) == "KeyError: 'x'"
    assert first_line(TimeoutError()) == named(TimeoutError()) == "TimeoutError"
    assert first_line("text\nmore") == "text" and first_line("") == ""
    assert len(first_line(RuntimeError("x" * 1000))) == LONGEST_LINE


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.50 GB)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        ValueError("Some modules are dispatched on the CPU or the disk. Make sure you don't have enough GPU RAM"),
    ],
)
def test_memory_that_ran_out_is_known_while_loading_and_while_running(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert "not enough memory for owner/model" in str(explained(error, ModelSettings(id="owner/model")))


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: device-side assert"), ValueError("not enough memory"), OSError("out of memory")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


# ----- our own messages -----

NAMES = ("Optuna", "Ray")
"""What a message may begin with in upper case."""


def messages() -> Iterator[tuple[str, list[str]]]:
    """(place, literal parts of the message) of every error of ours that is raised in bruno_ray with a message."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, BrunoError)}
    root = Path(bruno_ray.__file__).parent
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds):
                continue
            text = node.args[0] if node.args else None
            values = text.values if isinstance(text, ast.JoinedStr) else [text]
            parts = [part.value if isinstance(part, ast.Constant) else "" for part in values]
            yield f"{file.relative_to(root)}:{node.lineno}", parts


def test_messages_begin_in_lower_case_and_end_without_a_full_stop() -> None:
    found = dict(messages())
    assert len(found) > 100
    for place, parts in found.items():
        assert not parts[0][:1].isupper() or parts[0].startswith(NAMES), place
        assert not parts[-1].endswith("."), place
