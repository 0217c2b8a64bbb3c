"""Folders of saved models: found, and looked through before anything is loaded. No torch.

A broken folder is told apart by its files: config, every shard of the weights, tokenizer, chat template.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DEPTH = 2
"""Levels below a given path that are searched for models."""


def model_folders(path: Path) -> list[Path]:
    """``path`` itself, or the model folders below it if it is none."""
    if _looks_like_a_model(path) or not path.is_dir():
        return [path]
    return sorted(_below(path, DEPTH)) or [path]


def _below(path: Path, depth: int) -> Iterator[Path]:
    for folder in path.iterdir():
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        if _looks_like_a_model(folder):
            yield folder
        elif depth > 1:
            yield from _below(folder, depth - 1)


def _looks_like_a_model(folder: Path) -> bool:
    if (folder / "run.json").exists():  # has directions.safetensors
        return False
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


def saved_trial(folder: Path) -> int | None:
    """Number of the trial that a model was saved from, as it says itself; None if it does not."""
    number = _json(folder / "bruno.json")[0].get("trial")
    return number if isinstance(number, int) else None


def problem_of(folder: Path) -> str | None:
    """Why the folder cannot be loaded as a chat model, in one line; None if nothing speaks against it."""
    if not folder.is_dir():
        return f"there is no folder {folder}: check the path"
    config, problem = _json(folder / "config.json")
    if problem:
        return problem
    if not config.get("model_type"):
        return "config.json has no model_type: this is not a model of transformers"
    problem = _weights_problem(folder)
    if problem:
        return problem
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return "the tokenizer is missing (no tokenizer.json): copy it from the base model"
    settings: dict[str, Any] = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings, problem = _json(folder / name)
            if problem:
                return problem
    templates = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if not settings.get("chat_template") and not any((folder / name).exists() for name in templates):
        return "the tokenizer has no chat template: copy chat_template.jinja from the base model"
    return None


def _weights_problem(folder: Path) -> str | None:
    for name in WEIGHTS:
        index_file = folder / f"{name}.index.json"
        if index_file.is_file():
            index, problem = _json(index_file)
            if problem:
                return problem
            shards = sorted(set(index.get("weight_map", {}).values()))
            if not shards:
                return f"{index_file.name} names no weights: save the model again"
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                return f"{len(missing)} of {len(shards)} files of weights are missing ({missing[0]}): copy them as well"
        elif (folder / name).is_file():
            shards = [name]
        else:
            continue
        return next(filter(None, (_shard_problem(folder / shard) for shard in shards)), None)
    return "the weights are missing (no model.safetensors): copy them as well"


def _shard_problem(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None if file.stat().st_size else f"{file.name} is empty: copy it again"
    try:
        with safe_open(file, framework="numpy"):  # compares the header with the size of the file
            return None
    except (SafetensorError, OSError) as error:
        return f"{file.name} is damaged ({' '.join(str(error).split())}): copy it again"


def _json(file: Path) -> tuple[dict[str, Any], str | None]:
    """The content, and what is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{file.name} is missing: give the folder that holds the model"
    except (OSError, ValueError) as error:
        return {}, f"{file.name} cannot be read ({' '.join(str(error).split())}): copy it again"
    if not isinstance(content, dict):
        return {}, f"{file.name} is not a JSON object: copy it again"
    return content, None
