"""What becomes of one family of transformers: a tiny checkpoint of it goes through everything a user's would.

verdict("glm4v", folder)      # Verdict("glm4v", "glm4v_text", "supported", "attention, mlp")
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.ablation.live import LiveEditor
from bruno_ray.errors import ModelError, first_line
from bruno_ray.model.loading import LoadedModel, load_model
from bruno_ray.model.probing_checks import check_rows
from bruno_ray.settings import ModelSettings
from tests.support import all_families, tiny_models

WORKS = ("supported", "probed")
FAULTS = ("wrong", "traceback")
TOLERANCE = 1e-4
"""Of logits, relative to what the edit changes."""


@dataclass(frozen=True)
class Verdict:
    model_type: str
    text_type: str
    status: str
    """supported, probed, refused, wrong, traceback, or not built here (packages or sizes that tiny models lack)."""

    detail: str


def verdict(model_type: str, folder: Path) -> Verdict:
    """Build, save, load, edit, bake and generate; ``folder`` must not exist."""
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    try:
        model = all_families.tiny_model(model_type)
        text_type = model.config.get_text_config(decoder=True).model_type
        model.save_pretrained(folder)
        tiny_models.build_tokenizer().save_pretrained(folder)
    except Exception as error:  # anything: hundreds of classes, given sizes that they were not made for
        return Verdict(model_type, "", "not built", f"{type(error).__name__}: {first_line(error)[:100]}")
    settings = ModelSettings(id=str(folder), device_map="cpu", dtypes=("float32",))
    try:
        loaded = load_model(settings, only_look=True)
    except ModelError as error:
        return Verdict(model_type, text_type, "refused", str(error).replace(str(folder), model_type))
    except Exception as error:  # what a user would see as a traceback
        return Verdict(model_type, text_type, "traceback", f"{type(error).__name__}: {first_line(error)}")
    try:
        fault = _fault(loaded)
    except Exception as error:  # what a user would see as a traceback
        return Verdict(model_type, text_type, "traceback", f"{type(error).__name__}: {first_line(error)}")
    if fault:
        return Verdict(model_type, text_type, "wrong", fault)
    suffixes = {writer.name.split(".", _depth(writer.name))[-1] for writer in loaded.architecture.writers}
    return Verdict(
        model_type, text_type, "probed" if loaded.architecture.probed else "supported", ", ".join(sorted(suffixes))
    )


def _depth(name: str) -> int:
    """Parts of a module's name up to the number of its layer."""
    return next(i for i, part in enumerate(name.split(".")) if part.isdigit()) + 1


@torch.no_grad()
def _fault(loaded: LoadedModel) -> str:
    """What does not hold: rows that stay what they are alone, cache, live == baked. Empty if all does."""
    model, architecture = loaded.model, loaded.architecture
    try:
        check_rows(model)
    except ModelError as error:
        return str(error)
    edit = AblationParameters(max_weight=0.9, max_weight_position=0.0, min_weight=0.9, min_weight_distance=99.0)
    v = torch.nn.functional.normalize(
        torch.randn(architecture.d_model, generator=torch.Generator().manual_seed(0)), dim=0
    )
    bank = {"x": v.expand(architecture.n_layers + 1, 1, -1)}
    everywhere = Edit(dict.fromkeys(architecture.components, edit), "x", None, "full")
    editor = LiveEditor(architecture)
    ids = torch.arange(20).reshape(2, 10)
    before = model(input_ids=ids).logits
    editor.set([editor.resolve(everywhere, bank), None], [0, 1])
    live = model(input_ids=ids).logits
    editor.close()
    bake(architecture, everywhere, bank)
    baked = model(input_ids=ids).logits
    change = (live[0] - before[0]).abs().max()
    if not (live[0] - baked[0]).abs().max() <= TOLERANCE * change:
        return f"live and baked differ by {float((live[0] - baked[0]).abs().max() / change):.1e} of the edit"
    if not (live[1] - before[1]).abs().max() <= TOLERANCE * change:
        return "an unedited row changes beside an edited one"
    return ""
