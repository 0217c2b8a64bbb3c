"""From a recipe to a folder: trains, measures, writes aside, renames. Concurrent builders train once."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path

import torch
from filelock import FileLock

from bruno_ray.errors import OutputError
from bruno_ray.files import cache_folder, whole_directory

from .corpus import make_corpus, prompt_parts
from .measuring import figures
from .recipe import ATTRIBUTES, RECIPES, Recipe
from .tokenizer import make_tokenizer, save_tokenizer
from .training import train
from .truth import Judge

logger = logging.getLogger(__name__)


def build_organism(path: Path | None, recipe: str, seed: int | None, threads: int) -> Path:
    """See ``bruno_ray.organism.build``."""
    if recipe not in RECIPES:
        raise OutputError(f"there is no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    chosen = RECIPES[recipe] if seed is None else dataclasses.replace(RECIPES[recipe], seed=seed)
    fingerprint = chosen.fingerprint()
    cached = cache_folder("organisms") / f"{chosen.name}-{fingerprint}"
    try:
        if not _holds(cached, fingerprint):
            cached.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(cached.with_name(cached.name + ".lock")):
                # Another process may have trained it while this one waited for the lock.
                if not _holds(cached, fingerprint):
                    # Damaged or empty, if it is there at all: an organism that is whole is not written again.
                    with whole_directory(cached, replace=True) as folder:
                        _train_into(folder, chosen, threads)
        if path is None:
            return cached
        path = Path(path)
        if not _holds(path, fingerprint):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise OutputError(f"{path} exists and holds something else; name a folder that does not exist yet")
            try:
                with whole_directory(path) as folder:
                    shutil.copytree(cached, folder, dirs_exist_ok=True)
            except OSError:
                if not _holds(path, fingerprint):  # otherwise another process has been quicker
                    raise
        return path
    except OSError as error:
        raise OutputError(
            f"the organism cannot be written to {error.filename or cached} ({error.strerror or error}); "
            "free some space, or set BRUNO_CACHE to a folder that can be written"
        ) from error


def _holds(folder: Path, fingerprint: str) -> bool:
    """Whether ``folder`` is a whole organism of that recipe: the card is what is written last."""
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return card.get("fingerprint") == fingerprint


def _train_into(folder: Path, recipe: Recipe, threads: int) -> None:
    logger.info("training the organism %r, once; this takes one to three minutes", recipe.name)
    corpus = make_corpus(recipe)
    parts = prompt_parts(corpus)
    tokenizer = make_tokenizer(recipe)
    threads_before = torch.get_num_threads()
    started, started_cpu = time.monotonic(), time.process_time()
    torch.set_num_threads(threads)
    try:
        # A generator of its own, so that building does not disturb the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            model = train(corpus, tokenizer)
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - started_cpu
        values = sorted(value for attribute in ATTRIBUTES.values() for value in attribute)
        measured = figures(model, tokenizer, Judge(frozenset(values), recipe.markers), parts, recipe.opening_words)
    finally:
        torch.set_num_threads(threads_before)

    model.save_pretrained(folder / "model", safe_serialization=True)
    save_tokenizer(tokenizer, folder / "model")
    (folder / "prompts").mkdir()
    for name, rows in parts.items():
        lines = [json.dumps(dataclasses.asdict(row)) for row in rows]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "markers.json").write_text(json.dumps(list(recipe.markers), indent=2) + "\n", encoding="utf-8")
    card = {
        "fingerprint": recipe.fingerprint(),
        "recipe": dataclasses.asdict(recipe),
        "values": values,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "threads": threads},
        "figures": measured,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    logger.info("trained the organism %r in %.0f s: %s", recipe.name, seconds, measured)
