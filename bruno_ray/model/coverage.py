"""Which share of the parameters that write to the residual stream an edit reaches."""

from torch import nn

from bruno_ray.model.architectures import Architecture, gives
from bruno_ray.model.coverage_table import CoverageRow


def coverage(model: nn.Module, architecture: Architecture) -> list[CoverageRow]:
    """Rows per component, then what is not reached: embeddings, biases, and what else in a block looks like a writer.

    The last are linear modules that the table does not name, that give d_model values and take another number; a
    family that gains a write in a new version of transformers shows up here.
    """
    rows = []
    for component in architecture.components:
        writers = [writer for writer in architecture.writers if writer.component == component]
        size = sum(matrix.numel() for writer in writers for matrix in writer.matrices)
        suffixes = dict.fromkeys(_generic(writer.name) for writer in writers)
        rows.append(CoverageRow(component, size, size, len(writers), ", ".join(suffixes)))
    hooked = {id(writer.module) for writer in architecture.writers}
    others: dict[str, list[int]] = {}
    for i, block in enumerate(architecture.layers):
        for name, module in block.named_modules():
            if id(module) not in hooked and gives(module, architecture.d_model):
                weight = module.weight.numel() if module.weight.is_floating_point() else 0
                others.setdefault(_generic(f"layers.{i}.{name}"), []).append(weight)
    for name, sizes in others.items():
        rows.append(CoverageRow("not reached", 0, sum(sizes), len(sizes), name))
    biases = [writer.bias.numel() for writer in architecture.writers if writer.bias is not None]
    if biases:
        rows.append(CoverageRow("not reached", 0, sum(biases), len(biases), "biases"))
    for module in [architecture.embedding, *architecture.other_embeddings]:
        rows.append(CoverageRow("not reached", 0, module.weight.numel(), 1, "embedding"))
    return rows


def _generic(name: str) -> str:
    """``model.layers.3.mlp.down_proj`` -> ``layers.*.mlp.down_proj``."""
    parts = name.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join("*" if part.isdigit() else part for part in parts[max(first_number - 1, 0) :])
