"""Prompts as the token ids that a model is given: chat template, response prefix, and what is cut to fit."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from bruno_ray.errors import ModelError, PromptError
from bruno_ray.prompts.sets import Prompt


def messages(prompt: Prompt, fold_system: bool = False) -> list[dict[str, str]]:
    """Chat messages. `fold_system` puts the system text into the user's turn, for templates without that role."""
    if not prompt.system:
        return [{"role": "user", "content": prompt.user}]
    if fold_system:
        return [{"role": "user", "content": f"{prompt.system}\n\n{prompt.user}"}]
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]


def render(
    tokenizer: Any, prompts: Sequence[Prompt], response_prefix: str = "", max_tokens: int | None = None
) -> list[list[int]]:
    """Token ids of each prompt: chat template, header of the assistant's turn, `response_prefix`.

    A prompt longer than `max_tokens` loses the end of the user's text (before `kept_end`), exactly as much as is
    needed; system message, header and response prefix stay whole.

    Raises ModelError if the tokenizer has no chat template, PromptError if `max_tokens` is too small for the rest.
    """
    texts = render_texts(tokenizer, prompts, response_prefix)
    if not texts:
        return []
    ids = [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if max_tokens is not None:
        for i, prompt in enumerate(prompts):
            if len(ids[i]) > max_tokens:
                ids[i] = _cut_to_fit(tokenizer, prompt, response_prefix, max_tokens)
    return ids


def render_texts(tokenizer: Any, prompts: Sequence[Prompt], response_prefix: str = "") -> list[str]:
    """As `render`, before it is split into tokens."""
    if not prompts:
        return []
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{getattr(tokenizer, 'name_or_path', '') or 'this model'} is not a chat model: its tokenizer has no chat"
            " template; use the instruction-tuned variant"
        )
    folds = {system: _must_fold(tokenizer, system) for system in {prompt.system for prompt in prompts}}
    return [_template(tokenizer, messages(prompt, folds[prompt.system])) + response_prefix for prompt in prompts]


def _template(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise ModelError(f"the chat template of {name} fails ({error}); mend its chat_template") from error


def _must_fold(tokenizer: Any, system: str | None) -> bool:
    """True if the template refuses a system message (gemma's raises) or silently leaves it out."""
    import jinja2

    if not system:
        return False
    conversation = messages(Prompt("Hello", system))
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError:
        return True
    return system.strip() not in text


def _cut_to_fit(tokenizer: Any, prompt: Prompt, response_prefix: str, max_tokens: int) -> list[int]:
    """Ids of the prompt with the longest beginning of the user's text that fits, by bisection over its tokens."""
    end = len(prompt.user) - prompt.kept_end
    text, kept = prompt.user[:end], prompt.user[end:]
    cuts = [0, *_token_ends(tokenizer, text, max_tokens)]

    def ids_at(cut: int) -> list[int]:
        shortened = Prompt(text[:cut] + kept, prompt.system)
        return list(
            tokenizer(render_texts(tokenizer, [shortened], response_prefix)[0], add_special_tokens=False)["input_ids"]
        )

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
