"""How much disk a machine needs, from the size of the model that it will hold."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from bruno_ray.files import expanded
from cluster.errors import ClusterSettingsError

logger = logging.getLogger(__name__)

DEFAULT_DISK_GB = 40.0
"""For nodes without a model, such as the head: the image, this project and the run directory."""

BYTES_PER_PARAMETER = 2
"""bfloat16, where the number of parameters is not stated."""

LEAST_DISK_GB = ((65.0, 300.0), (30.0, 200.0))
"""(billions of parameters from which on, GB): 300 GB for the 70B class, 200 GB for the 32B class."""

HEAD_DISK_GB = 60.0
"""Beside the saved model, which the head keeps until it is fetched: image, installation, runs."""

HEAD_RAM_GB = 12.0
"""Beside the model that is saved in the head's memory: Ray, driver and study."""

LEAST_HEAD_RAM_GB = 16.0

WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class ModelSize:
    """Size of a model's weights; parameters in billions."""

    gb: float
    parameters: float

    @classmethod
    def of_gb(cls, gb: float) -> "ModelSize":
        return cls(gb, gb / BYTES_PER_PARAMETER)


def disk_for(model: ModelSize | None) -> float:
    """GB to rent: twice the model (download and edited copy) plus 20, and never less than its class needs."""
    if model is None:
        return DEFAULT_DISK_GB
    least = next((gb for billions, gb in LEAST_DISK_GB if model.parameters >= billions), 0.0)
    return max(2 * model.gb + 20, least)


def head_disk_for(models: Iterable[ModelSize]) -> float:
    """GB that the head needs for the largest model of its workers."""
    return max((size.gb for size in models), default=0.0) + HEAD_DISK_GB


def head_ram_for(models: Iterable[ModelSize]) -> float:
    """GB of memory that the head needs to save the largest model of its workers."""
    return max(max((size.gb for size in models), default=0.0) + HEAD_RAM_GB, LEAST_HEAD_RAM_GB)


def model_size(model: str) -> ModelSize:
    """Size of a local folder's weights, or of a model on the hub by its metadata; nothing is downloaded.

    Raises `ClusterSettingsError` where neither is found.
    """
    folder = expanded(model)
    if folder.is_dir():
        return _weights({path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}, None, model)

    from huggingface_hub import HfApi  # slow to import, and not needed where the size is given
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        info = HfApi().model_info(model, files_metadata=True)
    except (HTTPError, HFValidationError, OSError) as error:
        raise ClusterSettingsError(
            f"the size of model {model!r} cannot be looked up ({type(error).__name__}); "
            "give node_config.model_size_gb or node_config.disk_gb"
        ) from error
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return _weights(files, info.safetensors.total if info.safetensors else None, model)


def _weights(files: dict[str, int], parameters: int | None, model: str) -> ModelSize:
    for suffix in WEIGHT_SUFFIXES:  # the second only where there are none of the first: they hold the same
        if size := sum(size for name, size in files.items() if name.endswith(suffix)):
            guess = ModelSize.of_gb(size / 1e9)
            return ModelSize(guess.gb, parameters / 1e9) if parameters else guess
    raise ClusterSettingsError(f"model {model!r} has no weights ({' or '.join(WEIGHT_SUFFIXES)}); is it a model?")
