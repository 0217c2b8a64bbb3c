"""The text that all answers of a model begin with, and how reasoning is closed before it starts.

A direction is read at the position that decides what the answer will be. If every answer begins with the same
words, or with a reasoning block, that position is not the end of the prompt but the end of those words. The
shared beginning is therefore made part of the prompt, and a reasoning block is entered and left empty (as heretic
does): behaviour with reasoning switched on is not what is measured then.

Pure functions on strings. Answers must be decoded with special tokens kept, or openers cannot be seen.
"""

from collections.abc import Callable, Sequence

HARMONY = "<|channel|>analysis"

# What a model writes to start reasoning -> the whole of an empty block, up to the first token of the answer.
# Longer openers first where one begins another.
EMPTY_BLOCKS: dict[str, str] = {
    "<think>": "<think>\n\n</think>\n\n",  # DeepSeek R1, Qwen3, GLM, Nemotron and most others
    "<thinking>": "<thinking>\n\n</thinking>\n\n",
    "<thought>": "<thought>\n\n</thought>\n\n",
    "<reasoning>": "<reasoning>\n\n</reasoning>\n\n",
    "<seed:think>": "<seed:think>\n</seed:think>",
    "[THINK]": "[THINK][/THINK]",  # Magistral
    "\u25c1think\u25b7": "\u25c1think\u25b7\u25c1/think\u25b7",  # Kimi: white triangles
    "<|begin_of_thought|>": "<|begin_of_thought|>\n\n<|end_of_thought|>\n\n",
    "<|START_THINKING|>": "<|START_THINKING|><|END_THINKING|>",  # Command A Reasoning
    "<unused94>thought": "<unused94>thought\n<unused95>",  # MedGemma
    "<|channel>thought": "<|channel>thought\n<channel|>",  # Gemma 4
    # gpt-oss (harmony format): the analysis channel is a message of its own, then the final channel opens.
    HARMONY: ("<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"),
}

MIN_CHARS = 4
"""Shorter shared beginnings ("I", "The") are chance."""


def common_prefix(answers: Sequence[str]) -> str:
    """What all answers begin with, cut back to a word boundary, without spaces at its end.

    Empty if it is shorter than MIN_CHARS (unless it begins a reasoning block), or if the answers are all alike:
    then nothing tells their beginning from their content.
    """
    if len(set(answers)) < 2:
        only = answers[0].lstrip() if answers else ""
        return opener_of(only) or ""
    first, last = min(answers), max(answers)  # what these two share, all between them share
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    shared = first[:length]
    if opener := opener_of(shared.lstrip()):
        return shared[: shared.index(opener) + len(opener)]
    if any(len(answer) > len(shared) and answer[len(shared)].isalnum() for answer in answers):
        # Some answer goes on in the middle of a word, so that word is not shared.
        while shared and shared[-1].isalnum():
            shared = shared[:-1]
    # A space belongs to the token of the word after it.
    shared = shared.rstrip(" ")
    return shared if len(shared.strip()) >= MIN_CHARS else ""


def opener_of(text: str) -> str | None:
    """The reasoning opener that `text` begins with."""
    return next((opener for opener in EMPTY_BLOCKS if text.startswith(opener)), None)


def close_reasoning(prefix: str) -> str:
    """The empty block in place of a prefix that opens one; any other prefix as it is."""
    opener = opener_of(prefix.lstrip())
    return EMPTY_BLOCKS[opener] if opener else prefix


def closer_of(opener: str) -> str:
    """What ends a block of reasoning that begins with `opener`."""
    if opener == HARMONY:
        return "<|channel|>final<|message|>"
    return EMPTY_BLOCKS[opener][len(opener) :].strip()


def open_block(rendered_prompt: str) -> str | None:
    """The opener that a prompt ends with: its chat template begins the reasoning."""
    tail = rendered_prompt.rstrip("\n ")
    return next((opener for opener in EMPTY_BLOCKS if tail.endswith(opener)), None)


def close_header(rendered_prompt: str) -> str:
    """What closes a block that the chat template itself left open at the end of the prompt, else nothing.

    DeepSeek R1 and QwQ, for instance, end the assistant's header with `<think>` and a newline.
    """
    opener = open_block(rendered_prompt)
    if opener is None:
        return ""
    rest = EMPTY_BLOCKS[opener][len(opener) :]
    spaces = rendered_prompt[len(rendered_prompt.rstrip("\n ")) :]
    return rest.removeprefix(spaces) if rest.startswith(spaces) else rest


def settle_response_prefix(answer: Callable[[str], Sequence[str]], rendered_prompt: str = "") -> str:
    """The response prefix of a model.

    Args:
        answer: gives the unedited model's answers to a mix of target and baseline prompts when every answer has
            already begun with its argument. Called at most twice.
        rendered_prompt: one prompt through the chat template, in which an open reasoning block is looked for.

    Returns:
        Text to put after the assistant's header of every prompt; empty if answers have nothing in common.
    """
    prefix = close_header(rendered_prompt)
    found = common_prefix(answer(prefix))
    closed = close_reasoning(found)
    prefix += closed
    if closed != found:
        # With the block closed the answers change; what they share now comes on top.
        prefix += common_prefix(answer(prefix))
    return prefix
