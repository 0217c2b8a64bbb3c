"""What must hold before a model is edited at places that nobody has written into the table.

- The hooked edit of a writer is the edit of its weights (live == baked), on a copy of one module of each kind.
- A row of a padded batch is what it is alone, and a token read from the key-value cache is what it is without one.
"""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bruno_ray.errors import ModelError
from bruno_ray.model.architectures import Architecture
from bruno_ray.model.batching import input_device, pad_left
from bruno_ray.model.probing import REST, Recorded
from bruno_ray.model.writers import Writer

LENGTHS = (5, 9)
"""Tokens of the two rows that are run together and alone."""


def check(model: PreTrainedModel, architecture: Architecture, given: dict[str, Recorded]) -> None:
    """Raises ModelError that names what does not hold."""
    seen = set()
    for writer in architecture.writers:
        key = (type(writer.module).__name__, writer.name.rsplit(".", 1)[-1], len(writer.matrices))
        if key not in seen:
            seen.add(key)
            check_baking(writer, given[writer.name], architecture.d_model)
    check_rows(model)


@torch.no_grad()
def check_baking(writer: Writer, call: Recorded, d_model: int) -> None:
    """Raises ModelError if removing a direction from the output is not removing it from the weights."""
    if any(matrix.quantized or matrix.device.type == "meta" for matrix in writer.matrices):
        return  # cannot be written; a hook on the output is all that will be done to it
    direction = torch.nn.functional.normalize(torch.randn(d_model, generator=torch.Generator().manual_seed(1)), dim=0)
    module = deepcopy(writer.module)
    copies = [replace(matrix, module=module) for matrix in writer.matrices]
    for matrix in copies:
        weight = matrix.read()
        v = direction.to(weight.device)
        matrix.write(weight - torch.outer(v, v @ weight))
    arguments, keywords = call.inputs
    baked = _tensor(module(*arguments, **keywords)).double().reshape(call.parts, -1, d_model).sum(0)
    v = direction.double().to(baked.device)
    output = call.output.to(baked.device)
    bias = writer.read_bias()
    fixed = torch.zeros(d_model, dtype=torch.float64, device=baked.device) if bias is None else bias.double()
    live = output - torch.outer((output - fixed) @ v, v)
    _require(baked, live, writer.module, f"{writer.name}: an edit of its output is no edit of its weights")


@torch.no_grad()
def check_rows(model: PreTrainedModel) -> None:
    """Raises ModelError if padding on the left, or the key-value cache, changes logits."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = min(200, model.config.get_text_config().vocab_size)
    rows = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    device = input_device(model.get_input_embeddings())
    alone = [model(input_ids=torch.tensor([row], device=device)).logits[0, -1] for row in rows]
    padded = pad_left(rows, 0, device)
    together = model(
        input_ids=padded.input_ids, attention_mask=padded.attention_mask, position_ids=padded.position_ids
    ).logits[:, -1]
    kind = model.config.get_text_config(decoder=True).model_type
    _require(together, torch.stack(alone), model, f"in this {kind} model a row of a padded batch differs from it alone")
    first = model(input_ids=torch.tensor([rows[1][:-1]], device=device), use_cache=True)
    second = model(
        input_ids=torch.tensor([rows[1][-1:]], device=device),
        past_key_values=first.past_key_values,
        position_ids=torch.tensor([[len(rows[1]) - 1]], device=device),  # some count the wrong layer's cache
        use_cache=True,
    ).logits[0, -1]
    _require(second, alone[1], model, f"in this {kind} model a token differs when earlier ones come from its cache")


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _require(got: Tensor, wanted: Tensor, module: torch.nn.Module, what: str) -> None:
    got, wanted = got.double(), wanted.double()
    difference = float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))
    dtype = next(module.parameters()).dtype
    if not difference <= 2 * REST.get(dtype, REST[torch.float32]):
        raise ModelError(f"{what} (by {difference:.1%}): it cannot be edited rightly here")
