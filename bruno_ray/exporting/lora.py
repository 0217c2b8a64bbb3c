"""An edit as a LoRA adapter in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

With the edit's factors (``ablation.closed_forms``) a weight becomes W' = S (W - L^T R W), S = 1 but for `full`. The
adapter holds B and A with W' = W + B A (Hu et al. 2021, section 4.1; lora_alpha = r, so that nothing is scaled):

    none, pre:  B = -L^T, A = R W          exact, of the rank of the directions
    full:       B = U, A = U^T (W' - W)    U the leading left singular vectors; S has no low rank
    read:       B = -W R^T, A = L          exact: an edit of what a weight reads, W' = W (I - R^T L)

Of an edit of some attention heads A (or W' - W) is 0 in the columns of the others.

The format is that of PEFT 0.21 (https://huggingface.co/docs/peft/developer_guides/checkpoint): a pair of tensors per
module, ``base_model.model.MODULE.lora_A.weight`` (r, in) and ``.lora_B.weight`` (out, r). All modules have one rank,
padded with zeros: servers that load adapters expect it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from bruno_ray.ablation.closed_forms import Factors, apply_to_columns
from bruno_ray.ablation.edit import ADDITION
from bruno_ray.ablation.resolving import Resolver, part_of
from bruno_ray.errors import ModelError
from bruno_ray.exporting.base import Options, Source, require_modules, short_card
from bruno_ray.files import atomic_directory, require_free_space, size_text, write_json
from bruno_ray.model.loading import load_model
from bruno_ray.model.readers import Reader
from bruno_ray.model.writers import Writer

EXACT_SVD = 1024
"""Up to this many rows or columns all singular vectors are worked out; of larger weights the leading ones, by random
projections (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""

POWER_STEPS = 4
"""Of those: the weights' spectra are flat."""


@dataclass(frozen=True)
class Update:
    """W' - W of one module as B A."""

    b: Float[Tensor, "d r"]
    a: Float[Tensor, "r in"]
    error: float
    """Share of W' - W that B A leaves out, by Frobenius norm."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def padded(self, rank: int) -> "Update":
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return Update(pad(self.b, (0, more)), pad(self.a, (0, 0, 0, more)), self.error)


def export(source: Source, folder: Path, options: Options) -> str:
    """Write the adapter. Raises as ``exporting.base.Exporter``, among others for fused experts, and for a `full` edit
    whose rank is too high."""
    loaded = load_model(source.model, full_precision=True)
    architecture = loaded.architecture
    (edit,) = Resolver(architecture).resolve_all([source.edit], source.bank)
    work = [(site, factors) for site, factors in zip(architecture.sites, edit.factors) if factors is not None]
    require_modules([site for site, _ in work])
    _refuse_addition(source, [factors for _, factors in work])
    if not work:
        raise ModelError(f"trial {source.trial} edits nothing: export another one")
    updates = {
        site.name: update_of(site, factors, options, part_of(source.edit, site))
        if isinstance(site, Writer)
        else update_of_reader(site, factors)
        for site, factors in work
    }
    rank = max(update.rank for update in updates.values())
    error = max(update.error for update in updates.values())
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        wide = update.padded(rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = wide.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = wide.b.contiguous()
    transposed = any(isinstance(site.module, Conv1D) for site, _ in work)
    how = "It is exact." if error == 0 else f"It leaves out at most {error:.2%} of a weight's change (Frobenius norm)."
    card = short_card(
        source,
        "peft",
        f"{source.base_name}, {source.behaviour} ablated, as an adapter",
        f"A LoRA adapter of rank {rank} for {len(updates)} weights of {source.base_name}. {how}",
    )
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    require_free_space(folder, n_bytes, "the adapter")
    with atomic_directory(folder) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(aside / "adapter_config.json", config_of(source, list(updates), rank, transposed))
        write_json(aside / "bruno.json", {**source.origin, "base_fingerprint": loaded.fingerprint, "max_error": error})
        (aside / "README.md").write_text(card, encoding="utf-8")
    return f"{folder}: LoRA adapter of rank {rank} for {len(updates)} weights ({size_text(n_bytes)}). {how}"


def config_of(source: Source, modules: list[str], rank: int, fan_in_fan_out: bool) -> dict[str, Any]:
    """adapter_config.json; keys that are not there have PEFT's defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base_id,
        "revision": source.model.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


@torch.no_grad()
def update_of(writer: Writer, factors: Factors, options: Options, part: Sequence[int] | None = None) -> Update:
    """The change of a writer's only weight, of some heads' columns of it. Raises ModelError if the rank that is allowed
    leaves out too much of it."""
    weight = writer.weights()[0]
    ((_, columns),) = writer.chosen(part)
    if factors.scale is None:
        removed = factors.right @ weight
        if columns is not None:
            removed = torch.zeros_like(removed).index_copy_(1, torch.tensor(columns), removed[:, columns])
        return Update(-factors.left.T, removed, 0.0)
    change = apply_to_columns(weight, factors, columns) - weight
    left = _leading(change, options.max_rank)
    squares = (left.T @ change).double().square().sum(1)  # what each direction of the column space holds
    total = change.double().square().sum()
    left_out = ((total - squares.cumsum(0)).clamp(min=0) / total).sqrt()
    enough = (left_out <= options.max_error).nonzero()[:, 0]
    if not len(enough):
        raise ModelError(
            f"{writer.name} is changed with norm_mode full, of which an adapter of rank {len(squares)} leaves out"
            f" {float(left_out[-1]):.1%}: raise --max-rank or --max-error {options.max_error:g}, or save the model"
        )
    rank = int(enough[0]) + 1
    return Update(left[:, :rank], left[:, :rank].T @ change, float(left_out[rank - 1]))


@torch.no_grad()
def update_of_reader(reader: Reader, factors: Factors) -> Update:
    """The change of the only weight of a reader, which is read as its transpose."""
    return Update(-(factors.right @ reader.weights()[0]).T, factors.left, 0.0)


def _leading(change: Float[Tensor, "d in"], most: int) -> Float[Tensor, "d r"]:
    """The leading left singular vectors, at most so many."""
    most = min(most, *change.shape)
    if min(change.shape) <= EXACT_SVD:
        return torch.linalg.svd(change, full_matrices=False).U[:, :most]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(change, q=min(most + 8, *change.shape), niter=POWER_STEPS)[0][:, :most]


def _refuse_addition(source: Source, factors: list[Factors]) -> None:
    if any(each.offset is not None for each in factors):
        raise ModelError(
            f"trial {source.trial} adds to biases (component {ADDITION}), of which an adapter has none: save the whole"
            " model with `bruno-ray save`, or choose a trial without it"
        )
