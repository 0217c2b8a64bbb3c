"""An edit for vLLM: the base model's config and tokenizer, and the edit as data beside them. No weight is written.

The plug-in ``vllm_plugin/`` reads it: the base's own files are loaded, quantised ones too, and the modules that write
to the residual stream get hooks (``bruno_ray_vllm.hooks`` has the formula). ``edit.safetensors`` holds, in float32, the
factors of ``ablation.closed_forms`` for every module that is edited, by its name in transformers:

    MODULE.left    (r, d_model)     the strength is in it
    MODULE.right   (r, d_model)
    MODULE.scale   (d_model,)       norm_mode full only

config.json is the base's, with one more entry, ``bruno_ray`` (``Entry``).
"""

import hashlib
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor

from bruno_ray import __version__
from bruno_ray.ablation.closed_forms import Factors
from bruno_ray.ablation.resolving import Resolver, part_of
from bruno_ray.errors import ModelError
from bruno_ray.exporting.base import Options, Source, require_modules, short_card
from bruno_ray.files import atomic_directory, size_text, write_json
from bruno_ray.model.loading import load_model
from bruno_ray.model.readers import Reader
from bruno_ray.model.writers import Writer
from bruno_ray.publishing.base import find_base
from bruno_ray.publishing.card import is_hub_id
from bruno_ray.publishing.companions import copy_companions, read_json

FORMAT = 1
"""Goes up when the plug-in of before cannot read it any more."""

FILE_NAME = "edit.safetensors"
KEY = "bruno_ray"


class Entry(BaseModel):
    """What the plug-in finds under ``bruno_ray`` in config.json."""

    model_config = ConfigDict(extra="forbid")

    format: int
    version: str
    """Of bruno-ray."""

    run: str
    trial: int
    behaviour: str
    base: str | None
    """Hub id of the weights that the edit belongs to; None where they are a folder or a file of one machine."""

    base_name: str
    revision: str | None
    file: str
    sha256: str
    """Of that file. vLLM names what it has compiled after the config, so no edit meets the graph of another."""


def export(source: Source, folder: Path, options: Options) -> str:
    """Write config, tokenizer, edit and card. Raises as ``exporting.base.Exporter``, among others for fused experts."""
    base = find_base(source.model)
    # As vLLM reads it: what the checkpoint is stored in, not what the search quantised it to while loading.
    loaded = load_model(source.model.model_copy(update={"quantization": "none", "device_map": "cpu"}))
    architecture = loaded.architecture
    (edit,) = Resolver(architecture).resolve_all([source.edit], source.bank)
    edited = [(site, factors) for site, factors in zip(architecture.sites, edit.factors) if factors is not None]
    if not edited:
        raise ModelError(f"trial {source.trial} edits nothing: export another one")
    require_modules([site for site, _ in edited])
    work = [_of_whole_output(source, site, factors) for site, factors in edited]
    tensors = tensors_of(work)
    is_public = is_hub_id(source.model.id) and not Path(base.source).is_dir()
    with atomic_directory(folder) as aside:
        copy_companions(base.folder, aside, source.model.trust_remote_code)
        save_file(tensors, aside / FILE_NAME, metadata={"format": "pt"})
        entry = Entry(
            format=FORMAT,
            version=__version__,
            run=source.run,
            trial=source.trial,
            behaviour=source.behaviour,
            base=source.model.id if is_public else None,
            base_name=source.base_name,
            revision=source.model.revision or base.commit or None if is_public else None,
            file=FILE_NAME,
            sha256=hashlib.sha256((aside / FILE_NAME).read_bytes()).hexdigest(),
        )
        write_json(aside / "config.json", read_json(base.folder / "config.json") | {KEY: entry.model_dump()})
        write_json(aside / "bruno.json", {**source.origin, "base_fingerprint": loaded.fingerprint})
        (aside / "README.md").write_text(_card(source, is_public), encoding="utf-8")
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return f"{folder}: an edit of {len(work)} modules for vLLM ({size_text(n_bytes)}), without the base model's weights"


def _of_whole_output(source: Source, site: Writer | Reader, factors: Factors) -> tuple[Writer, Factors]:
    """Raises ModelError where an edit is none of all that a module writes, which is what the plug-in's hooks know."""
    if not isinstance(site, Writer):
        what = "what modules read"
    elif factors.offset is not None:
        what = "biases"
    elif part_of(source.edit, site) is not None:
        what = "some heads or experts only"
    else:
        return site, factors
    raise ModelError(
        f"trial {source.trial} edits {what} ({site.name}), which the plug-in for vLLM does not know: save the whole"
        " model with `bruno-ray save`, or choose a trial without it"
    )


def tensors_of(work: list[tuple[Writer, Factors]]) -> dict[str, Tensor]:
    """The file's content."""
    tensors: dict[str, Tensor] = {}
    for writer, factors in work:
        parts = {"left": factors.left, "right": factors.right, "scale": factors.scale}
        tensors |= {
            f"{writer.name}.{part}": value.detach().to("cpu", torch.float32).contiguous()
            for part, value in parts.items()
            if value is not None
        }
    return tensors


def _card(source: Source, is_public: bool) -> str:
    where = "" if is_public else """ --model-loader-extra-config '{"base": "BASE"}'"""
    text = (
        f"Config, tokenizer and an edit of {source.base_name}, without weights: vLLM reads those of the base model and"
        " edits what its layers write. With the plug-in `bruno-ray-vllm` beside vLLM (`vllm_plugin/` of bruno-ray):"
        f"\n\n```\nvllm serve FOLDER --load-format bruno_ray{where}\n```"
    )
    return short_card(source, "vllm", f"{source.base_name}, {source.behaviour} ablated, for vLLM", text)
