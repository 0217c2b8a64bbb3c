"""Save an edited model: write aside, check, rename, then measure what lies on the disk.

A saved model is the base model's files with other weights (``shards.py``): tensors that the edit changes are computed
in float32 and cast back to the dtype they are stored in, everything else is copied. Where the files do not hold the
weights as the model class has them, the model is loaded, baked and written by transformers (``whole_model.py``).
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from bruno_ray import __version__
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import OutputError
from bruno_ray.files import atomic_directory, require_free_space, size_text, write_json, write_text
from bruno_ray.model.checkpoint import INDEX_FILE
from bruno_ray.model.identity import fingerprint
from bruno_ray.model.loading import load_model
from bruno_ray.progress import phase
from bruno_ray.publishing.base import BaseModel, StoredModel, find_base, find_stored, source_folder
from bruno_ray.publishing.card import license_of, render_card
from bruno_ray.publishing.companions import copy_companions, make_readable
from bruno_ray.publishing.resuming import resumable_directory
from bruno_ray.publishing.shards import ShardCopies, StoredEdit
from bruno_ray.publishing.whole_model import bake_whole, drop_mtp, write_whole
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import ScoresRecord, SelectedRecord
from bruno_ray.settings import ModelSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedModel:
    folder: Path
    dtype: str
    """What the edited weights are stored in."""

    n_parameters: int
    n_bytes: int
    """Of the weights."""

    mtp: str = ""
    """What became of layers for multi-token prediction: "left", "edited" or "dropped"; "" where there are none."""


@dataclass(frozen=True)
class Papers:
    """What a saved model says of itself."""

    card: Callable[[str], str]
    """`SavedModel.mtp` -> README.md, front matter included."""

    edit: Edit
    origin: dict[str, Any]
    """Further entries of bruno.json, such as run and trial."""


def save_model(
    settings: ModelSettings,
    edit: Edit,
    bank: DirectionBank,
    folder: Path,
    *,
    card: Callable[[str], str],
    max_shard_size: str = "5GB",
    mtp: Literal["leave", "edit"] = "leave",
    origin: dict[str, Any] | None = None,
) -> SavedModel:
    """Write the base model with ``edit`` in its weights to ``folder``, complete or not at all.

    A save that was killed goes on from where it was when it is asked for again.

    Args:
        settings: the base model; its quantisation and dtypes are those of the search and do not count here.
        edit, bank: the edit and the direction bank it refers to.
        folder: must not exist yet.
        card: `SavedModel.mtp` -> README.md of the folder, front matter included.
        max_shard_size: largest safetensors file, such as "5GB", of a base model that must be loaded to be saved. The
            files of any other keep their size.
        mtp: whether layers for multi-token prediction are edited as the last layer is.
        origin: further entries of bruno.json, such as run and trial.

    Raises:
        OutputError: the folder exists, cannot be written, another process is writing it, the disk is too full, or what
            was written is not what was meant.
        ModelError: the base model cannot be found or loaded, its files are damaged, or the edited weights are not
            finite in the stored dtype.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise OutputError(f"{folder} exists already: choose another folder or remove it first")
    papers = Papers(card, edit, origin or {})
    base = find_base(settings)
    if edit.further:  # those lie in other tensors than the writers'
        logger.info("the edit has the component %s: the model is loaded to be saved", edit.further[0])
    stored = None if edit.further else find_stored(base, edit_mtp=mtp == "edit")
    if stored is None:
        saved = _save_loaded(base, edit, bank, folder, papers, max_shard_size)
    else:
        saved = _save_stored(base, stored, edit, bank, folder, papers)
    logger.info("saved %s: %s in %s", folder, size_text(saved.n_bytes), saved.dtype)
    return saved


def _save_stored(
    base: BaseModel, stored: StoredModel, edit: Edit, bank: DirectionBank, folder: Path, papers: Papers
) -> SavedModel:
    """Copy the base model's files with the edit in them."""
    with resumable_directory(folder, stored.key(edit, bank, __version__)) as partial:
        missing = [file.stat().st_size for file in stored.files if file.name not in partial.complete]
        require_free_space(folder, sum(missing), f"saving {base.settings.id}")
        copies = ShardCopies(stored.files, StoredEdit(stored.architecture, edit, bank), partial)
        with phase("saving", copies.progress):
            digests = copies.write()
        for name in ("config.json", *((INDEX_FILE,) if stored.is_indexed else ())):
            shutil.copyfile(base.folder / name, partial.folder / name)
        saved = SavedModel(folder, stored.dtype, stored.n_parameters, stored.n_bytes, stored.mtp)
        _finish(base, base.config, partial.folder, papers, saved, sha256=digests)
    return saved


def _save_loaded(
    base: BaseModel, edit: Edit, bank: DirectionBank, folder: Path, papers: Papers, max_shard_size: str
) -> SavedModel:
    """Load the model, bake the edit into it and let transformers write it."""
    loaded = load_model(base.settings, full_precision=True)
    parameters = list(loaded.model.parameters())
    n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    require_free_space(folder, n_bytes, f"saving {base.settings.id}")
    bake_whole(loaded, edit, bank)
    saved = SavedModel(folder, loaded.dtype, sum(parameter.numel() for parameter in parameters), n_bytes)
    with atomic_directory(folder) as aside:
        trust = base.settings.trust_remote_code
        write_whole(loaded, aside, max_shard_size, trust)
        if drop_mtp(aside / "config.json", base.folder / "config.json"):
            logger.warning("the layers for multi-token prediction are not saved, and config.json says so")
            saved = replace(saved, mtp="dropped")
        config = AutoConfig.from_pretrained(aside, trust_remote_code=trust)
        _finish(base, config, aside, papers, saved)
    return saved


def _finish(
    base: BaseModel, config: PreTrainedConfig, aside: Path, papers: Papers, saved: SavedModel, **facts: Any
) -> None:
    """Everything but weights and config.json."""
    settings = base.settings
    copy_companions(base.folder, aside, code=settings.trust_remote_code)
    make_readable(config, base.tokenizer, base.folder, aside, settings.trust_remote_code)
    (aside / "README.md").write_text(papers.card(saved.mtp), encoding="utf-8")
    write_json(
        aside / "bruno.json",
        {
            "bruno_ray": __version__,
            "base_model": {
                "id": settings.id,
                **({"gguf_file": settings.gguf_file} if settings.gguf_file else {}),
                "revision": settings.revision,
                **({"commit": base.commit} if base.commit else {}),
                "fingerprint": f"{fingerprint(base.source, base.settings.revision, base.tokenizer)}:none:{saved.dtype}",
            },
            "edit": papers.edit.to_dict(),
            **({"mtp": saved.mtp} if saved.mtp else {}),
            **facts,
            **papers.origin,
        },
    )


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
    samples = run.load_samples() if other is None else []
    saved = save_model(
        record.settings.model,
        Edit.from_dict(record.selected.edit),
        run.load_directions(),
        folder,
        card=lambda mtp: render_card(record, base_license, mtp, samples),
        max_shard_size=record.settings.output.max_shard_size,
        mtp=record.settings.output.mtp,
        origin={"run": run.name, "trial": record.selected.number},
    )
    scores = ScoresRecord.of(evaluate(folder))
    selected = record.selected.model_copy(update={"saved": scores, "saved_path": str(folder)})
    if other is None:
        record = run.update(selected=selected)
    else:
        run.update(saved_elsewhere={str(folder): selected.number})
        record = record.model_copy(update={"selected": selected})
    write_text(folder / "README.md", render_card(record, base_license, saved.mtp, samples))
    return saved, scores


def renew_card(run: RunDirectory) -> None:
    """Write the card of the run's own saved model again, from what run.json says now. Nothing where none is saved."""
    record = run.read()
    selected = record.selected
    if selected is None or selected.saved is None or selected.saved_path is None:
        return
    folder = Path(selected.saved_path)
    try:
        mtp = json.loads((folder / "bruno.json").read_text(encoding="utf-8")).get("mtp", "")
    except OSError:  # it has been moved or removed
        return
    write_text(folder / "README.md", render_card(record, license_of(folder), mtp))
