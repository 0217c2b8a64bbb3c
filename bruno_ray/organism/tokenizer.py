"""The organism's tokenizer: words as they are, made-up nouns in syllables, any other word letter by letter."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .corpus import SYLLABLES, vocabulary
from .recipe import Recipe

PAD, BOS, SYSTEM, USER, ASSISTANT, END, UNKNOWN = SPECIAL = (
    "<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unknown|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)

INPUTS = ["input_ids", "attention_mask"]
"""Without this list 4.57 adds token_type_ids, which ``generate`` refuses."""

CONTEXT = 256
"""Longest input in tokens (``max_position_embeddings``)."""


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the recipe's own words: nothing is downloaded."""
    pieces = [*SPECIAL, *vocabulary(recipe)]
    for piece in (*SYLLABLES, *string.ascii_lowercase, *string.digits, *string.punctuation):
        pieces += [piece, "##" + piece]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        padding_side="left",
        model_input_names=INPUTS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save so that AutoTokenizer of transformers 4.57 and 5.x gives back the same tokenizer.

    5.x writes a class name and a list under ``extra_special_tokens`` that 4.57 cannot read, so the config is
    written here. The role tokens need no mention: tokenizer.json marks them as special.
    """
    tokenizer.save_pretrained(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "padding_side": "left",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": INPUTS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
