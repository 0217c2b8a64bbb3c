"""Prompts as the token ids that a model is given: chat template, response prefix, and what is cut to fit.

Everything that renders a conversation comes through `apply_template`, which no clock can change (`dates.py`).
"""

import datetime
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from bruno_ray.errors import ModelError, PromptError, first_line
from bruno_ray.prompts.dates import dated, template_of
from bruno_ray.prompts.sets import Prompt

PROBE = "Hello"
"""A user's message; a template that works prints it."""


def messages(prompt: Prompt, fold_system: bool = False, examples: Sequence[Prompt] = ()) -> list[dict[str, str]]:
    """Chat messages; ``examples`` are turns before the prompt, with their answers.

    `fold_system` puts the system text into the first user's turn, for templates without that role.
    """
    turns = [
        {"role": role, "content": text}
        for example in examples
        for role, text in (("user", example.user), ("assistant", (example.answer or "").strip()))
    ]
    turns.append({"role": "user", "content": prompt.user})
    if not prompt.system:
        return turns
    if fold_system:
        return [{"role": "user", "content": f"{prompt.system}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "system", "content": prompt.system}, *turns]


def apply_template(
    tokenizer: Any,
    conversation: Sequence[dict[str, Any]],
    date: datetime.date,
    tools: Sequence[dict[str, Any]] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> str:
    """The conversation through the chat template, with the header of the assistant's turn, as on that ``date``.

    ``switches`` are variables of the template, such as `enable_thinking`; one that it does not know is passed over.
    Texts are given as a list of parts to templates that want them so.

    Raises ModelError if the tokenizer has no chat template or it loses what the user says, and what the template
    itself raises.
    """
    template = dated(template_of(tokenizer, tools), date)
    if _wants_parts(tokenizer, template):
        conversation = [_in_parts(message) for message in conversation]
    return _applied(tokenizer, conversation, template, tools, switches)


def _applied(
    tokenizer: Any,
    conversation: Sequence[dict[str, Any]],
    template: str,
    tools: Sequence[dict[str, Any]] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> str:
    return tokenizer.apply_chat_template(
        conversation,
        tools=tools,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        **(switches or {}),
    )


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


_forms: dict[str, bool] = {}
"""Whether a template wants parts, by its text: asked once, not for each of thousands of prompts."""


def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Templates of multimodal models may pass over content that is a string (llava, idefics3), without a word: the
    user's text is then in no prompt. Raises ModelError if it is in neither form."""
    if template not in _forms:
        question = [{"role": "user", "content": PROBE}]
        if PROBE in (plain := _applied(tokenizer, question, template)):
            _forms[template] = False
        elif PROBE in _applied(tokenizer, [_in_parts(message) for message in question], template):
            _forms[template] = True
        else:
            raise ModelError(
                f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'this model'} does not print what the"
                f" user says (it gives {plain[:60]!r}): fix its chat_template"
            )
    return _forms[template]


def render(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    response_prefix: str = "",
    max_tokens: int | None = None,
    *,
    date: datetime.date,
    examples: Sequence[Prompt] = (),
) -> list[list[int]]:
    """Token ids of each prompt: chat template, header of the assistant's turn, `response_prefix`.

    A prompt longer than `max_tokens` loses the end of the user's text (before `kept_end`), exactly as much as is
    needed; system message, header and response prefix stay whole. `date` is what a template prints that asks for it.

    Raises ModelError if the tokenizer has no chat template, PromptError if `max_tokens` is too small for the rest.
    """
    texts = render_texts(tokenizer, prompts, response_prefix, date=date, examples=examples)
    if not texts:
        return []
    ids = [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if max_tokens is not None:
        for i, prompt in enumerate(prompts):
            if len(ids[i]) > max_tokens:
                ids[i] = _cut_to_fit(tokenizer, prompt, response_prefix, max_tokens, date)
    return ids


def render_texts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    response_prefix: str = "",
    *,
    date: datetime.date,
    switches: Mapping[str, Any] | None = None,
    examples: Sequence[Prompt] = (),
) -> list[str]:
    """As `render`, before it is split into tokens; ``switches`` as of `apply_template`, ``examples`` of `messages`."""
    folds = {system: must_fold(tokenizer, system, date) for system in {prompt.system for prompt in prompts}}
    return [
        _text(tokenizer, messages(prompt, folds[prompt.system], examples), date, switches) + response_prefix
        for prompt in prompts
    ]


def must_fold(tokenizer: Any, system: str | None, date: datetime.date) -> bool:
    """True if the template refuses a system message (gemma's raises) or silently leaves it out."""
    if not system:
        return False
    try:
        text = apply_template(tokenizer, messages(Prompt("Hello", system)), date)
    except jinja2.TemplateError:
        return True
    return system.strip() not in text


def _text(
    tokenizer: Any, conversation: list[dict[str, str]], date: datetime.date, switches: Mapping[str, Any] | None = None
) -> str:
    try:
        return apply_template(tokenizer, conversation, date, switches=switches)
    except ModelError:
        raise
    except Exception as error:  # a template may do anything: syntax, undefined names, arithmetic with None
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise ModelError(
            f"the chat template of {name} fails ({type(error).__name__}: {first_line(error)}): fix its chat_template"
        ) from error


def _cut_to_fit(
    tokenizer: Any, prompt: Prompt, response_prefix: str, max_tokens: int, date: datetime.date
) -> list[int]:
    """Ids of the prompt with the longest beginning of the user's text that fits, by bisection over its tokens."""
    end = len(prompt.user) - prompt.kept_end
    text, kept = prompt.user[:end], prompt.user[end:]
    cuts = [0, *_token_ends(tokenizer, text, max_tokens)]

    def ids_at(cut: int) -> list[int]:
        shortened = Prompt(text[:cut] + kept, prompt.system)
        (rendered,) = render_texts(tokenizer, [shortened], response_prefix, date=date)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    fitting = bisect_right(cuts, max_tokens, key=lambda cut: len(ids_at(cut)))
    if fitting == 0:
        raise PromptError(
            f"residuals.max_tokens = {max_tokens} leaves no room for the user's text: chat template, system prompt and"
            f" suffix alone take {len(ids_at(0))} tokens; raise it"
        )
    return ids_at(cuts[fitting - 1])


def _token_ends(tokenizer: Any, text: str, at_most: int) -> list[int]:
    """Ends, in characters, of the first tokens of `text`; every character's end if the tokenizer keeps no offsets."""
    if not getattr(tokenizer, "is_fast", False):
        return list(range(1, len(text) + 1))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return sorted({end for _, end in offsets[:at_most] if end})
