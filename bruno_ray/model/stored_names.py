"""Which stored tensors a model class loads, and which of them its writers are.

A checkpoint's names are often not those of the parameters: transformers renames wrappers and prefixes while it loads,
and stacks one tensor per expert into a 3-D parameter. It is asked for that by names only, with a model that has no
memory for its weights.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from bruno_ray.model.architectures import Architecture
from bruno_ray.model.checkpoint import StoredMatrix, StoredTensor
from bruno_ray.model.classes import auto_class
from bruno_ray.model.writers import Matrix, Writer
from bruno_ray.transformers_internals import loaded_names, not_missed, not_unexpected

logger = logging.getLogger(__name__)


def empty_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `load_model` would load, without memory for its weights."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class NameMap:
    """What becomes of stored tensors when a model class loads them."""

    sources: Mapping[str, tuple[str, ...]]
    """Parameter or buffer -> the stored tensors it is made of, in the order in which they are put together."""

    ways: Mapping[str, str]
    """Parameter or buffer -> how, as in `transformers_internals.LoadedName`."""

    unused: tuple[str, ...]
    """Stored tensors that the class has no place for."""


def map_names(model: PreTrainedModel, names: Iterable[str]) -> NameMap:
    """What becomes of stored tensors when ``model`` is loaded from them unquantised."""
    sources: defaultdict[str, list[str]] = defaultdict(list)
    ways: dict[str, str] = {}
    unused = []
    for found in loaded_names(model, names):
        for parameter in found.parameters:
            sources[parameter].append(found.name)
            if ways.setdefault(parameter, found.way) != found.way:
                ways[parameter] = "converted"
        if not found.parameters:
            unused.append(found.name)
    return NameMap({parameter: tuple(stored) for parameter, stored in sources.items()}, ways, tuple(unused))


def stored_writers(
    model: PreTrainedModel, architecture: Architecture, names: NameMap, tensors: Mapping[str, StoredTensor]
) -> list[Writer] | None:
    """The writers of an empty model with their matrices in the files.

    Args:
        architecture: of ``model``.
        names: `map_names` of ``tensors``, which are all that are stored.

    Returns:
        None where a matrix cannot be found as it is in memory: under no name or several, put together in a way that is
        not known here, in another shape, or not as floating point numbers.
    """
    module_names = {id(module): name for name, module in model.named_modules()}

    def stored(matrix: Matrix) -> StoredMatrix | None:
        parameter = f"{module_names[id(matrix.module)]}.{matrix.parameter}"
        shape = tuple(getattr(matrix.module, matrix.parameter).shape)
        found, way = names.sources.get(parameter, ()), names.ways.get(parameter)
        index, transposed = matrix.index, matrix.transposed
        if way == "stacked" and index is not None and len(found) == shape[0]:
            tensor, shape, index = tensors[found[index]], shape[1:], None
        elif len(found) == 1 and way in ("as it is", "transposed", "transposed to fit"):
            tensor = tensors[found[0]]
            if way == "transposed" or (way == "transposed to fit" and tensor.shape != shape):
                shape, transposed = (*shape[:-2], shape[-1], shape[-2]), not transposed
        else:
            return None
        if tensor.shape != shape or not tensor.is_float:
            return None
        name = tensor.name if index is None else f"{tensor.name}[{index}]"
        return StoredMatrix(matrix.module, matrix.parameter, name, matrix.d_model, index, transposed, tensor=tensor)

    writers = []
    for writer in architecture.writers:
        matrices = [stored(matrix) for matrix in writer.matrices]
        if not all(matrices):
            missing = writer.matrices[matrices.index(None)].name
            logger.info("%s is not stored as it is in memory: the model is loaded to be saved", missing)
            return None
        writers.append(replace(writer, matrices=[m for m in matrices if m], bias=None))
    return writers


def misfits(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """What would go wrong if ``model`` (an empty one) were loaded from ``tensors`` as they are: parameters that are
    missing, tensors it does not know, other shapes or kinds of numbers. In words; empty where all is well."""
    names = map_names(model, tensors)
    parameters = model.state_dict()
    missing = [name for name in parameters if name not in names.sources]
    needless = {*not_missed(model, missing), *not_unexpected(model, names.unused)}
    found = [f"no {name}" for name in missing if name not in needless]
    found += [f"{name} is not known" for name in names.unused if name not in needless]
    for parameter, sources in names.sources.items():
        stored = [tensors[source] for source in sources]
        shape, shapes = tuple(parameters[parameter].shape), [tensor.shape for tensor in stored]
        way = names.ways[parameter]
        if way == "stacked":
            fits = [(len(shapes), *one) for one in shapes] == [shape] * len(shapes)
        else:  # what a conversion makes of shapes only the conversion knows
            fits = shapes == [shape] or way != "as it is"
        if not fits or any(tensor.is_float != parameters[parameter].is_floating_point() for tensor in stored):
            kinds = sorted({f"{tensor.dtype} {tensor.shape}" for tensor in stored})
            found.append(f"{parameter} {shape} is stored as {', '.join(kinds)}")
    return found


# ----- multi-token prediction -----


def mtp_blocks(writers: list[Writer], unused: Iterable[str]) -> dict[str, str]:
    """Unused tensors of layers for multi-token prediction -> the block that each is in, with a dot at the end; empty
    beside the blocks. Such layers are called `mtp`, or are blocks beyond the model's last one.

    Args:
        writers: the model's own, as `stored_writers` finds them.
    """
    last = writers[-1]
    stem = _stored(last)[0].tensor.name.partition(f".{last.layer}.")[0] + "."
    found = {}
    for name in unused:
        block = re.match(r"(?P<stem>(?:\w+\.)*?layers\.)(?P<layer>\d+)\.", name)
        beyond = block is not None and block["stem"] == stem and int(block["layer"]) > last.layer
        if beyond or "mtp" in name.split("."):
            found[name] = block[0] if block else ""
    return found


def mtp_writers(writers: list[Writer], blocks: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> list[Writer]:
    """The writers of multi-token prediction blocks, as further writers of the last layer.

    No class loads these blocks, so they are found by their names: what writes in one is called as in the blocks of
    the model, the last one that has such a writer.

    Args:
        writers: the model's own, as `stored_writers` finds them.
        blocks: from `mtp_blocks`.
    """
    found = []
    for block in dict.fromkeys(block for block in blocks.values() if block):
        taken: set[str] = set()
        for writer in reversed(writers):
            like = _stored(writer)
            names = [block + matrix.tensor.name.partition(f".{writer.layer}.")[2] for matrix in like]
            there = all(name in blocks and tensors[name].shape == m.tensor.shape for name, m in zip(names, like))
            if not there or taken & set(names):
                continue
            taken |= set(names)
            matrices: list[Matrix] = [
                StoredMatrix(m.module, m.parameter, name, m.d_model, m.index, m.transposed, tensor=tensors[name])
                for name, m in zip(names, like)
            ]
            if any(matrix.quantized for matrix in matrices):
                continue
            found.append(Writer(block.rstrip("."), writers[-1].layer, writer.component, writer.module, matrices, None))
    return found


def _stored(writer: Writer) -> list[StoredMatrix]:
    return [matrix for matrix in writer.matrices if isinstance(matrix, StoredMatrix)]
