"""The text of one answer while its tokens come in: pieces that never have to be taken back.

    stream = TextStream(decoder, stop=("END",))
    stream.push(token_id)      # the text that is now certain, perhaps ""
    stream.finish()            # the rest

Held back are bytes of a character that is not complete, and what may be the beginning of a stop string. The pieces
joined are the text of the tokens without special ones, up to the first stop string. Only the last tokens are decoded
each time, so a token costs the same at any length.
"""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"
PATIENCE = 8  # a character has at most four bytes, so after so many tokens what looks incomplete is broken


class Decoder:
    """Token ids to text, without special tokens. One per tokenizer; not to be shared between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)  # a tenth of the wrapper's overhead
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}

    def __call__(self, ids: Sequence[int]) -> str:
        if self._fast is not None:
            return self._fast.decode(list(ids), skip_special_tokens=True)
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """``shown`` are special tokens that are text here, with that text."""

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), shown: Mapping[int, str] | None = None) -> None:
        self._decoder = decoder
        self._shown = dict(shown or {})
        self._stop = StopScanner(stop)
        self._window: list[int] = []  # tokens that were shown last, for context, and those that were not shown yet
        self._n_context = 0
        self._context_text = ""

    @property
    def stopped(self) -> bool:
        """A stop string has come; the text is complete."""
        return self._stop.found

    def push(self, token_id: int) -> str:
        if token_id in self._shown and not self.stopped:
            before = self._show(len(self._window), self._decoder(self._window))
            self._window, self._n_context, self._context_text = [], 0, ""
            return self._stop.push(before + self._shown[token_id])
        if token_id in self._decoder.special_ids or self.stopped:
            return ""
        self._window.append(token_id)
        text = self._decoder(self._window)
        if not text.endswith(INCOMPLETE):
            return self._stop.push(self._show(len(self._window), text))
        if len(self._window) - self._n_context > PATIENCE:
            for end in range(len(self._window) - PATIENCE // 2, self._n_context, -1):
                earlier = self._decoder(self._window[:end])
                if text.startswith(earlier):
                    return self._stop.push(self._show(end, earlier))
        return ""

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        if self.stopped:
            return ""
        rest = self._show(len(self._window), self._decoder(self._window))
        return self._stop.push(rest) + self._stop.finish()

    def _show(self, end: int, text: str) -> str:
        """The window's tokens up to ``end`` are shown (``text``): what is new of them, and that is the context now."""
        piece = text[len(self._context_text) :]
        if piece or end - self._n_context > PATIENCE:
            self._window = self._window[self._n_context :]
            self._n_context = end - self._n_context
            self._context_text = self._decoder(self._window[: self._n_context])
        return piece


class StopScanner:
    """Text without what comes after, and including, the first stop string that is complete.

    The one that is complete first counts, of several the longest; so it does not matter in which pieces text comes.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        if not self._stop or not piece or self.found:
            return "" if self.found else piece
        text = self._held + piece
        hits = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)[1]]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
