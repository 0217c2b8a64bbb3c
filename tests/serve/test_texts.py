"""Texts grow in pieces that are never taken back and make the whole text."""

import itertools
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from serve.engine.texts import Decoder, StopScanner, TextStream
from tests.support import tiny_models

END = 258


def stream(tokens: list[int], stop: tuple[str, ...] = (), tokenizer: object = None) -> list[str]:
    """The piece of each token, and what was left at the end."""
    text = TextStream(Decoder(tokenizer or tiny_models.build_tokenizer()), stop)
    pieces = []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()]


def ids_of(text: str) -> list[int]:
    return tiny_models.build_tokenizer()(text, add_special_tokens=False)["input_ids"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words begin with the space mark, the first space of a text is dropped, and bytes stand for what has no token."""
    pieces = ["<unk>", "</s>", "\u2581", "\u2581the", "\u2581cat", "s", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    "text", ["plain words", "na\u00efve caf\u00e9", "\u65e5\u672c\u8a9e", "a\U0001f600b\U0001f468\u200d\U0001f469", ""]
)
def test_pieces_make_the_text_and_characters_come_whole(text: str) -> None:
    pieces = stream([*ids_of(text), END])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


def test_special_tokens_are_not_text() -> None:
    tokens = [*ids_of("one"), 260, *ids_of("two"), END]
    assert "".join(stream(tokens)) == "onetwo"


def test_an_incomplete_character_at_the_end_is_what_the_tokenizer_makes_of_it() -> None:
    tokens = ids_of("ab\u65e5")[:-1]
    pieces = stream(tokens)
    assert "".join(pieces[:-1]) == "ab"
    assert "".join(pieces) == tiny_models.build_tokenizer().decode(tokens)


def test_the_first_space_is_dropped_and_no_other() -> None:
    tokenizer = sentencepiece_like()
    tokens = [3, 4, 5, 3, *(6 + byte for byte in "\u65e5".encode()), 4, 1]
    pieces = stream(tokens, tokenizer=tokenizer)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True) == "the cats the\u65e5 cat"
    assert pieces[:4] == ["the", " cat", "s", " the"]


@pytest.mark.parametrize("seed", range(5))
def test_broken_bytes_hold_nothing_up_for_long(seed: int) -> None:
    """Bytes that make no characters: the text is the tokenizer's, and is shown while it comes."""
    rng = random.Random(seed)
    tokens = [rng.choice([65, *range(256)]) for _ in range(200)]
    pieces = stream(tokens)
    decoded = "".join(pieces)
    assert decoded == tiny_models.build_tokenizer().decode(tokens, clean_up_tokenization_spaces=False)
    silent = max(len(run) for run in "".join("x" if piece == "" else " " for piece in pieces[:-1]).split(" "))
    assert silent <= 12


def test_a_token_costs_the_same_at_any_length() -> None:
    """No decoding of more than a few tokens, even where nothing can be shown."""
    tokenizer = tiny_models.build_tokenizer()
    decoder = Decoder(tokenizer)
    longest = 0

    class Watched:
        special_ids = decoder.special_ids

        def __call__(self, ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return decoder(ids)

    for tokens in (ids_of("word " * 400), [0xE0 % 256] * 400, [END] * 400):
        text = TextStream(Watched())
        for token in tokens:
            text.push(token)
    assert 0 < longest < 40


# ----- stop strings -----


def test_a_stop_string_is_left_out_over_token_and_character_borders() -> None:
    tokens = ids_of("say \u65e5\u672c END more")
    pieces = stream(tokens, ("\u672c END",))
    assert "".join(pieces) == "say \u65e5"
    assert len(pieces) < len(tokens)


def test_what_may_become_a_stop_string_is_held_back_and_given_if_it_does_not() -> None:
    pieces = stream(ids_of("a EN b E"), (" END",))
    assert "".join(pieces) == "a EN b E"
    assert "".join(pieces[:4]) == "a"
    assert pieces[-1] == " E"


@pytest.mark.parametrize("stop", [("ab", "aab"), ("abcd", "bc"), ("bcde", "cd", "d"), ("aaa",), ("ba", "aba")])
def test_stopping_does_not_depend_on_the_pieces(stop: tuple[str, ...]) -> None:
    text = "xaabaabcaaababcdex"

    def cut(pieces: list[str]) -> tuple[str, bool]:
        scanner = StopScanner(stop)
        shown = "".join(scanner.push(piece) for piece in pieces)
        return shown + ("" if scanner.found else scanner.finish()), scanner.found

    expected = cut(list(text))
    assert expected[1] and not any(one in expected[0] for one in stop)
    rng = random.Random(0)
    for _ in range(50):
        borders = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(5))})
        assert cut([text[a:b] for a, b in itertools.pairwise(borders)]) == expected


def test_nothing_comes_after_a_stop() -> None:
    text = TextStream(Decoder(tiny_models.build_tokenizer()), (".",))
    shown = "".join(text.push(token) for token in ids_of("one. two"))
    assert shown + text.finish() == "one" and text.stopped
