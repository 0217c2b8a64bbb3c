"""From conversations and texts to token ids and back, as the run that measured the model did it.

One per base model, in the API's processes: what it does never waits for generation.
"""

import asyncio
import datetime
import logging
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from transformers import AutoProcessor, AutoTokenizer

from bruno_ray.errors import ModelError
from bruno_ray.model.locating import locate
from bruno_ray.prompts.rendering import apply_template, messages, must_fold
from bruno_ray.prompts.sets import Prompt
from bruno_ray.settings import ModelSettings
from serve.api.requests import Message
from serve.api.tool_calls import ToolFormat, tool_format_of
from serve.api.tools import Tool
from serve.errors import RequestError

logger = logging.getLogger(__name__)

LONG_TEXT = 20_000
"""Characters from which a text is tokenised beside the event loop."""

REPLACEMENT = "\ufffd"


class Renderer:
    """A model's tokenizer and chat template."""

    def __init__(self, settings: ModelSettings) -> None:
        """Raises ModelError if the tokenizer cannot be loaded."""
        name = locate(settings).id
        common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left", **common)
            if not self.tokenizer.chat_template:  # some multimodal models keep it with the processor
                self.tokenizer.chat_template = AutoProcessor.from_pretrained(name, **common).chat_template
        except (OSError, ValueError, ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"the tokenizer of {settings.id} cannot be loaded ({reason}): check the model") from error
        self.special_ids = frozenset(self.tokenizer.all_special_ids)
        has_template = bool(self.tokenizer.chat_template)
        self.tool_format = tool_format_of(self.tokenizer.get_chat_template(tools=[{}])) if has_template else None
        self._lock = threading.Lock()  # a fast tokenizer must not be called by two threads at a time
        self._folds = lru_cache(256)(self._must_fold)
        self.token_text = lru_cache(65536)(self._token_text)

    # ----- to token ids -----

    async def chat(
        self,
        conversation: Sequence[Message],
        system_prompt: str | None,
        response_prefix: str,
        date: datetime.date,
        tools: Sequence[Tool] = (),
    ) -> tuple[int, ...]:
        """Ids of a conversation up to where the answer begins.

        ``system_prompt`` counts where the conversation brings none, ``date`` where the chat template prints one.
        Raises RequestError (400) if the chat template refuses the conversation, or has no tools of a known form.
        """
        text = self.chat_text(conversation, system_prompt, date, tools) + response_prefix
        return await self.encode(text, add_special_tokens=False)

    async def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        if len(text) < LONG_TEXT:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        with self._lock:
            return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def chat_text(
        self,
        conversation: Sequence[Message],
        system_prompt: str | None,
        date: datetime.date,
        tools: Sequence[Tool] = (),
    ) -> str:
        """The conversation through the chat template, with the header of the answer."""
        if self.tool_format is None:
            _refuse_tools(conversation, tools)
        called = {call.id: call.function.name for message in conversation for call in message.tool_calls or ()}
        turns = [_as_dict(message, called) for message in conversation]
        n_system = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        if n_system:
            system = "\n\n".join(turn["content"] for turn in turns[:n_system])
            turns = turns[n_system:]
        else:
            system = system_prompt or ""
        if not turns:
            raise RequestError(400, "there is no user message: add one", param="messages")
        if system and self._folds(system, date):
            if turns[0]["role"] != "user":
                raise RequestError(
                    400,
                    "this model's chat template has no system role, and the first message after it is not the user's",
                    param="messages",
                )
            turns[0] = {**turns[0], "content": messages(Prompt(turns[0]["content"], system), True)[0]["content"]}
        elif system:
            turns.insert(0, {"role": "system", "content": system})
        return self._template(turns, date, [tool.for_template() for tool in tools])

    def _template(self, turns: list[dict[str, Any]], date: datetime.date, tools: list[dict[str, Any]]) -> str:
        try:
            text = apply_template(self.tokenizer, turns, date, tools or None)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                400, f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error
        late = next((turn for turn in turns[1:] if turn["role"] == "system"), None)
        if late is not None and late["content"].strip() not in text:
            raise RequestError(
                400, "this model's chat template leaves out later system messages: put them first", param="messages"
            )
        missing = [name for tool in tools if (name := tool["function"]["name"]) not in text]
        if missing:
            raise RequestError(400, f"this model's chat template leaves out the tool {missing[0]!r}", param="tools")
        return text

    def _must_fold(self, system: str, date: datetime.date) -> bool:
        return must_fold(self.tokenizer, system, date)

    def shown_in(self, form: ToolFormat) -> tuple[tuple[int, str], ...]:
        """The marker of the form where it is a special token, which answers would not show."""
        token_id = self.tokenizer.convert_tokens_to_ids(form.marker) if form.marker else None
        return ((token_id, form.marker),) if token_id in self.special_ids else ()

    # ----- from token ids -----

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a prompt, special tokens included."""
        with self._lock:
            return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> list[int] | None:
        """UTF-8 bytes of a token; None where the token is a part of a character whose bytes are not known."""
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return list(text.encode())
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if len(token) == 6 and token.startswith("<0x"):  # byte fallback of SentencePiece
            return [int(token[3:5], 16)]
        try:
            return [_byte_of_character()[character] for character in token]
        except KeyError:
            return None


def _as_dict(message: Message, called: Mapping[str, str]) -> dict[str, Any]:
    """For a chat template; ``called`` has the function of every call by its id."""
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [call.for_template() for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    name = message.name or called.get(message.tool_call_id or "")  # some templates want the function's name
    return {**turn, "name": name} if name else turn


def _refuse_tools(conversation: Sequence[Message], tools: Sequence[Tool]) -> None:
    reason = "this model's chat template has no tools, or writes calls in a form that is not known"
    if tools:
        raise RequestError(400, f"{reason}: leave tools out", param="tools")
    if any(message.tool_calls or message.role == "tool" for message in conversation):
        raise RequestError(400, f"{reason}: leave calls and results out", param="messages")


@lru_cache(1)
def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (GPT-2, Radford et al. 2019): printable bytes are
    themselves, the others come from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
