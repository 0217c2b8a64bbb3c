"""Answers of a given form: which tokens a grammar allows next.

The grammar itself is llguidance's (the extra ``[grammar]``), which follows it byte by byte through the tokenizer's own
tokens. Without the package nothing here is used, and no request gets this far.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from serve.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Grammars:
    """Makes the states of answers; the tokenizer is read once, when the first grammar is asked for (a second or so)."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = sorted(end_ids)
        self._read: Any = None

    def state(self, grammar: str) -> "GrammarState":
        """Where an answer begins. Raises InvalidRequest if llguidance cannot follow the grammar or the tokenizer."""
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise InvalidRequest(
                "answers of a given form need llguidance where the model runs: pip install bruno-ray[grammar]",
                "response_format",
            ) from None
        if self._read is None:
            try:
                self._read = from_tokenizer(self._tokenizer, eos_token=self._end_ids or None)
            except (ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise InvalidRequest(
                    f"this model's tokenizer cannot be held to a form ({reason}): leave response_format out",
                    "response_format",
                ) from error
        matcher = LLMatcher(self._read, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise InvalidRequest(f"the form cannot be followed: {reason}", "response_format")
        return GrammarState(matcher, self._read.vocab_size)


class GrammarState:
    """How far one answer has come in its grammar; belongs to the engine's thread."""

    def __init__(self, matcher: "LLMatcher", n_tokens: int) -> None:
        self._matcher = matcher
        self._n_tokens = n_tokens

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)

    @property
    def complete(self) -> bool:
        """Nothing can follow any more."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def problem(self) -> str | None:
        """Why the answer cannot go on: the grammar has got too large to follow, say."""
        return " ".join(self._matcher.get_error().split()) or None

    def allowed(self, vocabulary: int) -> Bool[Tensor, " V"]:
        """Which tokens may follow, on the CPU; none where there is a problem."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, self._n_tokens)
        fill_next_token_bitmask(self._matcher, bits)
        allowed_V = torch.zeros(vocabulary, dtype=torch.bool)
        if self.problem is None:
            found = np.unpackbits(bits.view(np.uint8), bitorder="little")[: min(self._n_tokens, vocabulary)]
            allowed_V[: len(found)] = torch.from_numpy(found).bool()
        return allowed_V
