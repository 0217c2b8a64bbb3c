"""Which stored tensors a model class loads, and which of them its writers are.

A checkpoint's names are often not those of the parameters: transformers renames wrappers and prefixes while it loads,
and stacks one tensor per expert into a 3-D parameter. It keeps what it does as data (`conversion_mapping.py` there,
applied by `core_model_loading.py`), which is asked here, by names only. These are the only uses of transformers'
private names for it; `tests/test_stored_names.py` loads models both ways for each family.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from bruno_ray.model.architectures import Architecture
from bruno_ray.model.checkpoint import FLOATS, StoredMatrix, StoredTensor
from bruno_ray.model.classes import auto_class
from bruno_ray.model.writers import Matrix, Writer

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

    stacked: frozenset[str]
    """Parameters whose sources are stacked along a new first axis."""

    converted: frozenset[str]
    """Parameters whose sources are changed in another way: split, concatenated, transposed."""

    unused: tuple[str, ...]
    """Stored tensors that the class has no place for."""


def map_names(model: PreTrainedModel, names: Iterable[str]) -> NameMap:
    """Rename stored tensors as transformers does while it loads ``model`` unquantised."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    sources: defaultdict[str, list[str]] = defaultdict(list)
    stacked, converted, unused = set(), set(), []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if target not in parameters:
            unused.append(name)
            continue
        if pattern is None:
            sources[target].append(name)
            continue
        rule = converter_of[pattern]
        for other in rule.target_patterns:  # a tensor may be split into several parameters
            parameter = target.replace(rule.target_patterns[0], other)
            sources[parameter].append(name)
            stacks = len(rule.operations) == 1 and getattr(rule.operations[0], "dim", None) == 0
            stacks = stacks and isinstance(rule.operations[0], MergeModulelist)
            (stacked if stacks else converted).add(parameter)
    return NameMap(
        {parameter: tuple(found) for parameter, found in sources.items()},
        frozenset(stacked),
        frozenset(converted),
        tuple(unused),
    )


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
        found = names.sources.get(parameter, ())
        shape = tuple(getattr(matrix.module, matrix.parameter).shape)
        index = matrix.index
        if parameter in names.converted or not found:
            return None
        if parameter in names.stacked:
            if index is None or len(found) != shape[0]:
                return None
            tensor, shape, index = tensors[found[index]], shape[1:], None
        elif len(found) == 1:
            tensor = tensors[found[0]]
        else:
            return None
        candidate = StoredMatrix(
            matrix.module,
            matrix.parameter,
            tensor.name if index is None else f"{tensor.name}[{index}]",
            matrix.d_model,
            index,
            matrix.transposed,
            tensor=tensor,
        )
        return candidate if tensor.shape == shape and not candidate.quantized else None

    writers = []
    for writer in architecture.writers:
        matrices = [stored(matrix) for matrix in writer.matrices]
        if not all(matrices):
            missing = writer.matrices[matrices.index(None)].name
            logger.info("%s is not stored as it is in memory: the model is loaded to be saved", missing)
            return None
        writers.append(
            Writer(writer.name, writer.layer, writer.component, writer.module, [m for m in matrices if m], bias=None)
        )
    return writers


def misfits(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """What would go wrong if ``model`` (an empty one) were loaded from ``tensors`` as they are: parameters that are
    missing, tensors it does not know, other shapes or kinds of numbers. In words; empty where all is well."""
    names = map_names(model, tensors)
    parameters = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [name for name in parameters if name not in names.sources and name not in tied]
    found = [f"no {name}" for name in _without(missing, model._keys_to_ignore_on_load_missing)]
    found += [f"{name} is not known" for name in _without(names.unused, model._keys_to_ignore_on_load_unexpected)]
    for parameter, sources in names.sources.items():
        shape, shapes = tuple(parameters[parameter].shape), [tensors[source].shape for source in sources]
        if parameter in names.stacked:
            fits = [(len(shapes), *one) for one in shapes] == [shape] * len(shapes)
        elif parameter in names.converted:
            fits = True  # what a conversion makes of shapes only the conversion knows
        else:
            fits = shapes == [shape]
        kinds = {tensors[source].dtype for source in sources}
        if not fits or parameters[parameter].is_floating_point() != (kinds <= FLOATS.keys()):
            stored = ", ".join(map(str, shapes[:3]))
            found.append(f"{parameter} {shape} is stored as {stored} {', '.join(sorted(kinds))}")
    return found


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    """The names in which none of the regular expressions is found."""
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


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
