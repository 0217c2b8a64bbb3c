"""What lies beside the weights of a saved model: the base model's own files, with what transformers 4 needs to read
them (``transformers4.py``)."""

import datetime
import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from bruno_ray.errors import OutputError
from bruno_ray.files import write_json
from bruno_ray.prompts.dates import dated
from bruno_ray.publishing.transformers4 import readable_config, readable_processor_files, readable_tokenizer_config

logger = logging.getLogger(__name__)

# What a checkpoint has beside its weights and its config.json.
COMPANION_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates/*", "generation_config.json",
    "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
CODE_FILES = ("*.py",)

# Texts on which a tokenizer shows its habits: leading spaces, digits, case, accents, newlines, code, other scripts.
TOKENIZER_PROBES = (
    "Hello world", " leading and  double spaces ", "12345 + 67,890.12", "It's DON'T we'll",
    "na\u00efve caf\u00e9 \u00a3\u20ac", "line one\n\n\tline two\r\n", "def f(x):\n    return x**2",
    "\u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600", "",
)  # fmt: skip


def copy_companions(source: Path, aside: Path, code: bool) -> None:
    """Copy over whatever the base model has beside weights and config; its generation config replaces ours."""
    (aside / "generation_config.json").unlink(missing_ok=True)  # of the neutralised model in memory
    for pattern in (*COMPANION_FILES, *(CODE_FILES if code else ())):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                target = aside / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def make_readable(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: Path, aside: Path, trust: bool
) -> None:
    """Add what transformers 4 needs to the files in ``aside``, and check that this version still reads the same.

    Args:
        config: of the saved model.
        tokenizer: of the base model in ``source``.
        aside: has config.json and the companions; files that need nothing stay byte for byte.

    Raises:
        OutputError: the tokenizer in ``aside`` is another one than ``tokenizer``.
    """
    written, original = read_json(aside / "config.json"), read_json(source / "config.json")
    if (readable := readable_config(written, original)) != written:
        before = (aside / "config.json").read_bytes()
        write_json(aside / "config.json", readable)
        if not _same_config(config, aside, trust):
            logger.warning("config.json is left as it was: version 4 may misread it")
            (aside / "config.json").write_bytes(before)

    _make_tokenizer_readable(tokenizer, aside, trust)
    if not _same_tokens(tokenizer, aside, trust):
        raise OutputError(
            f"the tokenizer of {source} does not survive saving: use a base model that has a tokenizer.json"
        )

    processor_file = aside / "processor_config.json"
    if processor_file.is_file():
        processor = read_json(processor_file)
        for name, content in readable_processor_files(processor).items():
            if content != processor and (name == processor_file.name or not (aside / name).exists()):
                write_json(aside / name, content)


def _make_tokenizer_readable(tokenizer: PreTrainedTokenizerBase, aside: Path, trust: bool) -> None:
    file = aside / "tokenizer_config.json"
    if not file.is_file():
        return
    before = file.read_bytes()
    config = read_json(file)
    # Version 5 marks its files with `backend` and leaves add_bos_token to tokenizer.json.
    starts_with_bos = _starts_with_bos(tokenizer) if "backend" in config else None
    if (readable := readable_tokenizer_config(config, starts_with_bos)) == config:
        return
    write_json(file, readable)
    if not _same_tokens(tokenizer, aside, trust):
        logger.warning("tokenizer_config.json is left as it was: transformers 4 may not read it")
        file.write_bytes(before)


def _same_config(ours: PreTrainedConfig, folder: Path, trust: bool) -> bool:
    """Whether the config in ``folder`` can be read and describes the same model."""
    ignored = {"_name_or_path", "transformers_version", "dtype", "architectures"}
    try:
        read = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except (KeyError, TypeError, ValueError) as error:  # how configs refuse a combination of keys
        logger.debug("config.json with the older names cannot be read: %s", error)
        return False

    def essence(values: Any) -> Any:
        if not isinstance(values, dict):
            return list(values) if isinstance(values, tuple) else values
        return {key: essence(value) for key, value in values.items() if key not in ignored}

    mine, theirs = essence(ours.to_dict()), essence(read.to_dict())
    return all(key in theirs and theirs[key] == value for key, value in mine.items())


def _same_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path, trust: bool) -> bool:
    """Whether the tokenizer in ``folder`` has the templates of ``tokenizer`` and splits probes and chats as it does."""
    read = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust))
    mine = _templates(tokenizer)
    return _templates(read) == mine and _habits(read, mine) == _habits(tokenizer, mine)


def _habits(tokenizer: PreTrainedTokenizerBase, templates: dict[str, str]) -> list[list[int]]:
    """Token ids of the probes, of all special tokens in a row, and of a chat in the default template."""
    texts = [*TOKENIZER_PROBES, "".join(str(token) for token in tokenizer.all_special_tokens)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    if "default" in templates:
        chat = [{"role": "user", "content": TOKENIZER_PROBES[0]}]
        # One date for both tokenizers: the first may be asked a moment before midnight.
        template = dated(templates["default"], datetime.date.min)
        ids.append(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, chat_template=template)
        )
    return ids


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates by name: a tokenizer may have one, several, or leave its own to a processor."""
    template = tokenizer.chat_template
    return dict(template) if isinstance(template, dict) else {"default": template} if template else {}


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer(TOKENIZER_PROBES[0])["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
