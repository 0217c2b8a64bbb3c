"""Chat templates that print the date are given one: no prompt depends on the day on which it is rendered.

Templates ask the clock through `strftime_now(format)`, a function that transformers puts into their environment. A
macro of that name in front of the template's text takes its place; whatever else the template does (Llama's prefers a
`date_string` that nobody gives it here, Llama 3.1's prints a constant) stays as its author wrote it. The date could not
be handed over as an argument: transformers lets no function through, and few templates read `date_string`.
"""

import datetime
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from bruno_ray.errors import ModelError

CLOCK = "strftime_now"
DIRECTIVE = re.compile(r"%[-_0^#]?[a-zA-Z]")


@lru_cache(64)
def dated(template: str, date: datetime.date) -> str:
    """The text of a Jinja chat template in which it is always midnight at the beginning of ``date``.

    A template that never asks for the date is returned as it is.
    """
    if CLOCK not in template:
        return template
    # The format may be computed, so every directive that is written anywhere in the template is replaced in it.
    midnight = datetime.datetime.combine(date, datetime.time())
    found = sorted(set(DIRECTIVE.findall(template)))
    steps = [("%%", "\\x00"), *((directive, midnight.strftime(directive)) for directive in found), ("\\x00", "%")]
    filters = "".join(f' | replace("{old}", "{new}")' for old, new in steps)
    # `+%}` keeps a newline with which the template begins.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro +%}}{template}"


def prints_date(tokenizer: object) -> bool:
    """Whether the tokenizer's chat template asks for the date, so that prompts differ from day to day."""
    return CLOCK in template_of(tokenizer)


def template_of(tokenizer: object, tools: Sequence[dict[str, Any]] | None = None) -> str:
    """The text of the chat template for a conversation with these tools. Raises ModelError if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{getattr(tokenizer, 'name_or_path', '') or 'this model'} is not a chat model: its tokenizer has no chat"
            " template; use the instruction-tuned variant"
        )
    return tokenizer.get_chat_template(tools=tools)
