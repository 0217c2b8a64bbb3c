"""A base model as files: what is stored where, and which stored tensors an edit changes. Nothing of it is loaded."""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import Architecture, find_architecture
from bruno_ray.model.checkpoint import (
    FLOATS,
    INDEX_FILE,
    SINGLE_FILE,
    StoredMatrix,
    StoredTensor,
    read_header,
    read_index,
    weight_files,
)
from bruno_ray.model.families import in_table
from bruno_ray.model.loading_errors import explained
from bruno_ray.model.locating import locate
from bruno_ray.model.quantisation import stored_format
from bruno_ray.model.stored_names import empty_model, map_names, mtp_blocks, mtp_writers, stored_writers
from bruno_ray.publishing.companions import CODE_FILES, COMPANION_FILES
from bruno_ray.settings import ModelSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """The base model of a saved one."""

    settings: ModelSettings
    source: str
    """Folder, or id on the hub."""

    folder: Path
    """Its files: the folder, or the snapshot in the hub's cache."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def commit(self) -> str:
        """Of the hub's repository, after which its snapshots are named; empty for a folder."""
        return "" if Path(self.source).is_dir() else self.folder.name

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are stored in another form than that of the model class."""
        return stored_format(self.config) is not None


@dataclass(frozen=True)
class StoredModel:
    """The weights of a base model in its files."""

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    architecture: Architecture
    """Of an empty model, with writers in the files."""

    mtp: str = ""
    """What an edit does to layers for multi-token prediction, which no model class loads: "left" or "edited"; "" where
    there are none."""

    @property
    def is_indexed(self) -> bool:
        return self.files[0].name != SINGLE_FILE

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def n_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """What most of the weights that can be edited are stored in, such as "bfloat16"."""
        matrices = [m for writer in self.architecture.writers for m in writer.matrices if isinstance(m, StoredMatrix)]
        (name, _), *_ = Counter(matrix.tensor.dtype for matrix in matrices).most_common()
        return str(FLOATS[name]).removeprefix("torch.")

    def key(self, edit: Edit, bank: DirectionBank, *more: Any) -> str:
        """Changes with whatever decides the bytes of the edited files."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        directions = bank[edit.direction_set].contiguous().cpu()
        given = [edit.to_dict(), self.mtp, files, list(directions.shape), *more]
        digest = hashlib.sha256(json.dumps(given).encode())
        digest.update(directions.numpy().tobytes())
        return digest.hexdigest()


def find_base(settings: ModelSettings) -> BaseModel:
    """Look the base model up, without its weights.

    Raises:
        ModelError: it cannot be found or fetched, or its tokenizer cannot be loaded.
    """
    source = locate(settings).id
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, padding_side="left", **options))
    except Exception as error:
        raise explained(error, settings) from error
    return BaseModel(settings, source, source_folder(settings), config, tokenizer)


def find_stored(base: BaseModel, edit_mtp: bool = False) -> StoredModel | None:
    """The weights in the files, fetched where the base model is on the hub; None where they must be loaded to be
    edited: quantised ones, families that are probed, files that are not safetensors, names that cannot be mapped to
    those of the model class.

    Args:
        edit_mtp: layers for multi-token prediction are edited as the last layer is.

    Raises:
        ModelError: a file is damaged or missing.
    """
    if base.is_quantised:
        logger.info("%s is stored quantised: it is loaded to be saved, in full precision", base.settings.id)
        return None
    if not in_table(base.config):
        logger.info("%s is in no table of architectures: it is loaded to be saved", base.settings.id)
        return None
    if not Path(base.source).is_dir():
        _fetch(base.settings, [SINGLE_FILE, INDEX_FILE])
        if not (base.folder / SINGLE_FILE).is_file() and (base.folder / INDEX_FILE).is_file():
            _fetch(base.settings, sorted(set(read_index(base.folder).values())))
    files = tuple(weight_files(base.folder))
    if not files:
        logger.info("%s has no safetensors: it is loaded to be saved", base.settings.id)
        return None
    headers = [read_header(file) for file in files]
    tensors = {name: tensor for header in headers for name, tensor in header.items()}
    if len(tensors) < sum(map(len, headers)):  # which of them transformers takes is its own affair
        logger.info("%s has tensors in two files: it is loaded to be saved", base.settings.id)
        return None
    model = empty_model(base.config, base.settings.trust_remote_code)
    architecture = find_architecture(model)
    names = map_names(model, tensors)
    writers = stored_writers(model, architecture, names, tensors)
    if writers is None:
        return None
    blocks = mtp_blocks(writers, names.unused)
    further = mtp_writers(writers, blocks, tensors) if edit_mtp else []
    if edit_mtp and blocks and not further:
        logger.warning(
            "the writers in the layers for multi-token prediction were not found: these layers are left as they are"
        )
    architecture = replace(architecture, writers=[*writers, *further])
    return StoredModel(files, tensors, architecture, ("edited" if further else "left") if blocks else "")


def source_folder(settings: ModelSettings) -> Path:
    """Where the base model's companion files lie: its own folder, or its snapshot in the hub cache."""
    settings = locate(settings)
    folder = Path(settings.id)
    if folder.is_dir():
        return folder
    return _fetch(settings, [*COMPANION_FILES, *CODE_FILES, "config.json", "README.md"])


def _fetch(settings: ModelSettings, patterns: list[str]) -> Path:
    """The snapshot of a hub model with the files of these patterns."""
    try:
        snapshot = huggingface_hub.snapshot_download(settings.id, revision=settings.revision, allow_patterns=patterns)
    except (OSError, HTTPError) as error:
        raise ModelError(
            f"the files of {settings.id} cannot be fetched: check the name, the network and HF_TOKEN"
        ) from error
    return Path(snapshot)
