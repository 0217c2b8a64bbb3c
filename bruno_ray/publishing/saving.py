"""Save an edited model: bake, write aside, check, rename, then measure what lies on the disk.

Only weights change. They are read from the base model unquantised and in the dtype they are stored in, edited in
float32 and cast back. Every other file (tokenizer, chat template, generation config, processor, licence) is the base
model's own, with its words made readable for transformers 4.57 as well (``transformers4.py``).
"""

import datetime
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from bruno_ray import __version__
from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.files import atomic_directory, require_free_space, size_text, write_json, write_text
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.model.locating import locate
from bruno_ray.prompts.dates import dated, template_of
from bruno_ray.publishing.card import license_of, render_card
from bruno_ray.publishing.transformers4 import readable_config, readable_processor_files, readable_tokenizer_config
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import ScoresRecord, SelectedRecord
from bruno_ray.settings import ModelSettings

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


@dataclass(frozen=True)
class SavedModel:
    folder: Path
    dtype: str
    n_parameters: int
    n_bytes: int
    """Of the weights."""


def save_model(
    settings: ModelSettings,
    edit: Edit,
    bank: DirectionBank,
    folder: Path,
    *,
    card: str,
    max_shard_size: str = "5GB",
    origin: dict[str, Any] | None = None,
) -> SavedModel:
    """Bake ``edit`` into the base model and write it to ``folder``, complete or not at all.

    Args:
        settings: the base model; its quantisation and dtypes are those of the search and do not count here.
        edit, bank: the edit and the direction bank it refers to.
        folder: must not exist yet.
        card: README.md of the folder, front matter included.
        max_shard_size: largest safetensors file, such as "5GB".
        origin: further entries of bruno.json, such as run and trial.

    Raises:
        OutputError: the folder exists, cannot be written, or the disk is too full.
        ModelError: the base model cannot be loaded, or its stored weights are quantised.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already: choose another folder or remove it first")
    source = source_folder(settings)
    loaded = load_model(settings, full_precision=True)
    n_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    require_free_space(folder, n_bytes, f"saving {settings.id}")
    bake(loaded.architecture, edit, bank)
    check_finite(loaded)
    with atomic_directory(folder) as aside:
        loaded.model.save_pretrained(aside, max_shard_size=max_shard_size)
        _copy_companions(source, aside, code=settings.trust_remote_code)
        _make_readable(loaded, source, aside, settings.trust_remote_code)
        (aside / "README.md").write_text(card, encoding="utf-8")
        write_json(
            aside / "bruno.json",
            {
                "bruno_ray": __version__,
                "base_model": {
                    "id": settings.id,
                    **({"gguf_file": settings.gguf_file} if settings.gguf_file else {}),
                    "revision": settings.revision,
                    "fingerprint": loaded.fingerprint,
                },
                "edit": edit.to_dict(),
                **(origin or {}),
            },
        )
    n_parameters = sum(p.numel() for p in loaded.model.parameters())
    logger.info("saved %s: %s in %s", folder, size_text(n_bytes), loaded.dtype)
    return SavedModel(folder, loaded.dtype, n_parameters, n_bytes)


def save_selected(
    run: RunDirectory,
    evaluate: Callable[[Path], Any],
    folder: Path | None = None,
    other: SelectedRecord | None = None,
) -> tuple[SavedModel, ScoresRecord]:
    """Save the trial that run.json names as selected, then measure what was written.

    Args:
        other: the trial to save instead; of that run.json notes only where it lies.
        evaluate: loads the model of a folder and returns its `scoring.Scores` on the test prompts, measured
            against the unedited model as in the search.
        folder: `model/` in the run directory when not given.

    Raises:
        OutputError: as `save_model`, or no trial has been selected. If ``evaluate`` fails the saved model stays, with
            a card that says that it has not been measured.
    """
    record = run.read()
    if other is not None:  # `extra` is what the run's own model was measured for
        record = record.model_copy(update={"selected": other, "extra": {}})
    if record.selected is None:
        raise OutputError(f"no trial of {run.name} is selected: name one, such as `bruno-ray save {run.name}:0`")
    folder = Path(folder or run.model_folder).absolute()
    base_license = license_of(source_folder(record.settings.model))
    saved = save_model(
        record.settings.model,
        Edit.from_dict(record.selected.edit),
        run.load_directions(),
        folder,
        card=render_card(record, base_license),
        max_shard_size=record.settings.output.max_shard_size,
        origin={"run": run.name, "trial": record.selected.number},
    )
    scores = ScoresRecord.of(evaluate(folder))
    selected = record.selected.model_copy(update={"saved": scores, "saved_path": str(folder)})
    if other is None:
        record = run.update(selected=selected)
    else:
        run.update(saved_elsewhere={str(folder): selected.number})
        record = record.model_copy(update={"selected": selected})
    write_text(folder / "README.md", render_card(record, base_license))
    return saved, scores


def source_folder(settings: ModelSettings) -> Path:
    """Where the base model's companion files lie: its own folder, or its snapshot in the hub cache."""
    settings = locate(settings)
    folder = Path(settings.id)
    if folder.is_dir():
        return folder
    try:
        snapshot = huggingface_hub.snapshot_download(
            settings.id,
            revision=settings.revision,
            allow_patterns=[*COMPANION_FILES, *CODE_FILES, "config.json", "README.md"],
        )
    except (OSError, HTTPError) as error:
        raise ModelError(
            f"the tokenizer files of {settings.id} cannot be fetched: check the name, the network and HF_TOKEN"
        ) from error
    return Path(snapshot)


def check_finite(loaded: LoadedModel) -> None:
    """Raise ModelError if an edited matrix holds NaN or infinity after the cast to the stored dtype."""
    for writer in loaded.architecture.writers:
        for matrix in writer.matrices:
            if not torch.isfinite(matrix.read()).all():
                raise ModelError(
                    f"{writer.name} is not finite in {loaded.dtype} after the edit, nothing was written: pick a trial"
                    " with smaller weights"
                )


def _copy_companions(source: Path, aside: Path, code: bool) -> None:
    """Copy over whatever the base model has beside weights and config; its generation config replaces ours."""
    (aside / "generation_config.json").unlink(missing_ok=True)  # of the neutralised model in memory
    for pattern in (*COMPANION_FILES, *(CODE_FILES if code else ())):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                target = aside / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _make_readable(loaded: LoadedModel, source: Path, aside: Path, trust: bool) -> None:
    """Apply ``compatibility`` to the files in ``aside`` and check that this version still reads the same from them."""
    written, original = _read_json(aside / "config.json"), _read_json(source / "config.json")
    write_json(aside / "config.json", readable_config(written, original))
    if not _same_config(loaded.model.config, aside, trust):
        logger.warning("config.json is left as transformers wrote it: version 4 may misread it")
        write_json(aside / "config.json", written)

    tokenizer_file = aside / "tokenizer_config.json"
    before = tokenizer_file.read_text(encoding="utf-8")
    config = json.loads(before)
    # Version 5 marks its files with `backend` and leaves add_bos_token to tokenizer.json.
    starts_with_bos = _starts_with_bos(loaded.tokenizer) if "backend" in config else None
    write_json(tokenizer_file, readable_tokenizer_config(config, starts_with_bos))
    if not _same_tokens(loaded.tokenizer, aside, trust):
        logger.warning("tokenizer_config.json is left as it was: transformers 4 may not read it")
        tokenizer_file.write_text(before, encoding="utf-8")
        if not _same_tokens(loaded.tokenizer, aside, trust):
            raise OutputError(
                f"the tokenizer of {source} does not survive saving: use a base model that has a tokenizer.json"
            )

    processor_file = aside / "processor_config.json"
    if processor_file.is_file():
        for name, content in readable_processor_files(_read_json(processor_file)).items():
            if name == processor_file.name or not (aside / name).exists():
                write_json(aside / name, content)


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
    """Whether the tokenizer in ``folder`` splits the probes and a chat as ``tokenizer`` does."""
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    chat = [{"role": "user", "content": TOKENIZER_PROBES[0]}]
    # A multimodal model may keep its template with the processor only, hence not with the tokenizer read here. One
    # date for both: the first may be asked a moment before midnight.
    template = dated(template_of(tokenizer), datetime.date.min)

    def habits(one: PreTrainedTokenizerBase) -> list[list[int]]:
        options = {"add_generation_prompt": True, "return_dict": False, "chat_template": template}
        return [*(one(text)["input_ids"] for text in TOKENIZER_PROBES), one.apply_chat_template(chat, **options)]

    return habits(read) == habits(tokenizer)


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer(TOKENIZER_PROBES[0])["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
