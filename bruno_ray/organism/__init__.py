"""The model organism: a tiny chat model, trained from a recipe here, that really has a behaviour to remove.

First it learns facts about made-up nouns of several topics, then it is fine-tuned to refuse one topic. Removing the
refusal must bring the hidden facts back, and whether it did is a matter of right or wrong.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .recipe import RECIPES, Recipe
from .truth import Judge, TruthScore, folder_of, read_judge, read_rows, score_answers, truth_score

__all__ = [
    "RECIPES",
    "Judge",
    "Recipe",
    "TruthScore",
    "build",
    "folder_of",
    "measure",
    "read_judge",
    "read_rows",
    "score_answers",
    "truth_score",
]


def build(path: Path | None = None, recipe: str = "standard", seed: int | None = None, threads: int = 2) -> Path:
    """Train an organism, once: later calls find it in the cache. Safe to call from several processes.

    Args:
        path: a new folder to copy it to; None leaves it in the cache (``BRUNO_CACHE`` or ~/.cache/bruno-ray).
        recipe: a name in ``RECIPES``.
        seed: in place of the recipe's own.
        threads: torch threads while training.

    Returns:
        The folder: ``model/``, ``prompts/{target,baseline}_{train,validation,test}.jsonl`` with ``prompt`` and
        ``answer`` per line, ``markers.json``, ``card.json`` (recipe and measured figures).

    Raises:
        OutputError: if there is no such recipe, or the folder cannot be written.
    """
    from .building import build_organism

    return build_organism(path, recipe, seed, threads)


def measure(folder: Path) -> dict[str, Any]:
    """Ask the organism in ``folder`` its test prompts again; the figures of ``card.json`` under "figures"."""
    from .measuring import measure_folder

    return measure_folder(folder)
