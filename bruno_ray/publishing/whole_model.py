"""A base model that has to be loaded to be edited: baked in memory and written by transformers, then checked by name.

This is the way of quantised bases, of families that are probed, of files that are not safetensors, and of names that
`stored_names.py` cannot map.
"""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from bruno_ray.ablation.baking import bake
from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import ModelError, OutputError
from bruno_ray.files import write_json
from bruno_ray.model.checkpoint import read_header, weight_files
from bruno_ray.model.loading import LoadedModel
from bruno_ray.model.stored_names import empty_model, misfits
from bruno_ray.publishing.companions import read_json

logger = logging.getLogger(__name__)

MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys of config.json that say how many layers for multi-token prediction there are."""


def bake_whole(loaded: LoadedModel, edit: Edit, bank: DirectionBank) -> None:
    """Bake the edit into the model in memory.

    Raises:
        ModelError: an edited matrix is still quantised, or is not finite in the stored dtype.
    """
    bake(loaded.architecture, edit, bank)
    for writer in loaded.architecture.writers:
        for matrix in writer.matrices:
            if not torch.isfinite(matrix.read()).all():
                raise ModelError(
                    f"{writer.name} is not finite in {loaded.dtype} after the edit, nothing was written: pick a trial"
                    " with smaller weights"
                )


def write_whole(loaded: LoadedModel, aside: Path, max_shard_size: str, trust_remote_code: bool = False) -> None:
    """Write weights and config.json of the model in memory into ``aside``.

    Raises:
        OutputError: the files are not what the model class loads: a tensor is missing, not known, or of another kind.
    """
    cast(PreTrainedModel, loaded.model).save_pretrained(aside, max_shard_size=max_shard_size)
    tensors = {name: tensor for file in weight_files(aside) for name, tensor in read_header(file).items()}
    config = AutoConfig.from_pretrained(aside, trust_remote_code=trust_remote_code)
    wrong = misfits(empty_model(config, trust_remote_code), tensors)
    if getattr(config, "quantization_config", None):
        wrong.append("config.json says that it is quantised")
    if wrong:
        raise OutputError(
            f"what transformers wrote is not what it would load ({'; '.join(wrong[:3])}), nothing was saved:"
            " use an unquantised copy of the base model as safetensors"
        )


def drop_mtp(file: Path, base: Path) -> bool:
    """Let config.json promise no layers for multi-token prediction: no model class loads them, so they are not there.

    Args:
        file, base: config.json of the saved model and of its base.

    Returns:
        Whether there was a promise.
    """
    config = read_json(file)
    promised = _promise_none(config, read_json(base))
    write_json(file, config)
    return promised


def _promise_none(config: dict[str, Any], original: dict[str, Any]) -> bool:
    keys = [key for key in MTP_COUNTS if config.get(key) or original.get(key)]
    config.update(dict.fromkeys(keys, 0))
    parts = {name: part for name, part in config.items() if isinstance(part, dict)}
    return any([bool(keys), *(_promise_none(part, original.get(name) or {}) for name, part in parts.items())])
