"""The shared beginning of answers, and reasoning blocks closed before they start."""

from collections.abc import Callable, Sequence

import pytest

from bruno_ray.prompts.response_prefix import (
    EMPTY_BLOCKS,
    close_header,
    close_reasoning,
    common_prefix,
    settle_response_prefix,
)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Sure, here is one", "Sure, there are two"], "Sure,"),
        (["Answer: the capital", "Answer: the cat"], "Answer: the"),
        (["Answer: the", "Answer: the cat"], "Answer: the"),
        (["The sky", "The cat"], ""),
        (["I think so", "No"], ""),
        (["the same answer", "the same answer"], ""),
        (["only one answer"], ""),
        ([], ""),
        (["", "Sure, here"], ""),
        (["Answer:\n\nA", "Answer:\n\nB"], "Answer:\n\n"),
        (["<think>\nThe user", "<think>\nThe user wants"], "<think>"),
        (["\n<think>A", "\n<think>B"], "\n<think>"),
        (["<think>same", "<think>same"], "<think>"),
    ],
)
def test_common_prefix(answers: list[str], expected: str) -> None:
    assert common_prefix(answers) == expected


@pytest.mark.parametrize("opener", EMPTY_BLOCKS)
def test_every_opener_is_closed(opener: str) -> None:
    answers = [f"{opener}\nThe user asks about stones", f"{opener}\nLet me see"]
    block = close_reasoning(common_prefix(answers))
    assert block == EMPTY_BLOCKS[opener]
    assert block.startswith(opener) and len(block) > len(opener)


def test_the_longer_of_two_openers_is_recognised() -> None:
    assert close_reasoning("<thinking>") == EMPTY_BLOCKS["<thinking>"]


@pytest.mark.parametrize(
    ("header", "closing"),
    [
        ("<|im_start|>assistant\n<think>\n", "\n</think>\n\n"),
        ("<|im_start|>assistant\n<think>", "\n\n</think>\n\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|im_start|>assistant\n", ""),
    ],
)
def test_a_block_the_template_left_open_is_closed(header: str, closing: str) -> None:
    assert close_header(header) == closing
    if closing:
        assert (header + closing).endswith(EMPTY_BLOCKS["<think>"])


def thinking_model(header: str) -> tuple[list[str], Callable[[str], Sequence[str]]]:
    """A model that reasons unless its block is closed already, and then begins every answer with a heading."""
    asked: list[str] = []

    def answer(prefix: str) -> Sequence[str]:
        asked.append(prefix)
        if "</think>" not in header + prefix:
            return ["<think>\nHm, stones.", "<think>\nHm, fish."]
        return ["**Answer:** stones are", "**Answer:** fish"]

    return asked, answer


def test_settling_asks_again_after_closing() -> None:
    asked, answer = thinking_model(header="")
    assert settle_response_prefix(answer) == "<think>\n\n</think>\n\n**Answer:**"
    assert asked == ["", "<think>\n\n</think>\n\n"]


def test_settling_with_a_header_that_opens_the_block() -> None:
    asked, answer = thinking_model(header="<think>\n")
    assert settle_response_prefix(answer, "assistant\n<think>\n") == "\n</think>\n\n**Answer:**"
    assert asked == ["\n</think>\n\n"]


def test_settling_of_a_plain_model_asks_once() -> None:
    asked: list[str] = []

    def answer(prefix: str) -> list[str]:
        asked.append(prefix)
        return ["Stones are hard.", "Fish swim."]

    assert settle_response_prefix(answer) == ""
    assert asked == [""]
