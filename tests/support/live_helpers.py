"""What the tests of live and baked edits share: edits of every kind, random banks, padded batches, a relative error."""

import torch
from torch import Tensor, nn

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.model.writers import Matrix
from tests.support import tiny_models

KERNEL = AblationParameters(max_weight=1.2, max_weight_position=1.4, min_weight=0.3, min_weight_distance=2.0)
NARROW = AblationParameters(max_weight=1.0, max_weight_position=1.0, min_weight=0.5, min_weight_distance=0.5)
EDITS = [
    Edit({"attention": KERNEL, "mlp": KERNEL}, "a", 0.5, "none"),
    Edit({"attention": KERNEL, "mlp": NARROW}, "b", None, "pre"),
    Edit({"attention": NARROW, "mlp": KERNEL}, "a", 1.3, "full"),
    Edit({"mlp": KERNEL}, "b", None, "full"),
]


def make_bank(n_layers: int, d_model: int = tiny_models.HIDDEN, seed: int = 1) -> DirectionBank:
    """Two direction sets of different rank."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(n_layers + 1, d_model, rank, generator=generator))[0]
        .transpose(1, 2)
        .contiguous()
        for name, rank in (("a", 2), ("b", 1))
    }


def batch(rows: int, seed: int = 0, length: int = 9) -> dict[str, Tensor]:
    """Left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % 3] = 0
    return {"input_ids": torch.where(mask == 1, ids, 256), "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits[:, -4:].float()


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def dequantized_copy(quantized: nn.Module, plain: nn.Module) -> nn.Module:
    """The full-precision model with every 4-bit weight replaced by what it stands for."""
    for name, module in quantized.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = Matrix(module, "weight", name, module.out_features).read()
            target = plain.get_submodule(name)
            with torch.no_grad():
                target.weight.copy_(weight if isinstance(target, nn.Linear) else weight.T)
    return plain
