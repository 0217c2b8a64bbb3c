"""Whether edits of a model can be trained at all: tried on one text, before a search is spent."""

from collections.abc import Sequence

import torch

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import ModelError, first_line
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.lean_forward import own_forward
from bruno_ray.learning.checkpointing import checkpointed
from bruno_ray.model.batching import is_out_of_memory, pad_left
from bruno_ray.settings import LearnedSettings


def require_gradient(engine: BatchEngine, prompt: Sequence[int], n_tokens: int, settings: LearnedSettings) -> None:
    """The way forth and back through an edit, with a prompt's tokens and an answer of ``n_tokens``.

    Raises:
        ModelError: no gradient comes through this model's kernels, the norm mode asks for a weight that cannot be
            read, or memory does not suffice for one text.
    """
    architecture = engine.loaded.architecture
    ids = (*prompt, *[prompt[-1]] * n_tokens)
    layers = () if settings.checkpointing == "off" else architecture.layers
    with torch.enable_grad():
        rows_RD = torch.eye(1, architecture.d_model, requires_grad=True)
        one = torch.ones(())
        n_writers = len(architecture.writers)
        factors = tuple(engine.editor.factors(i, rows_RD, one, settings.norm_mode) for i in range(n_writers))
        engine.editor.set([ResolvedEdit(Edit({}, "", None, settings.norm_mode), factors)], [0])
        try:
            padded = pad_left([ids], 0, engine.device)
            arguments = padded.input_ids, padded.attention_mask, padded.position_ids
            with checkpointed(layers):
                logits_1NV = own_forward(engine.model, *arguments, None, n_tokens)
                (gradient_RD,) = torch.autograd.grad(logits_1NV.float().logsumexp(-1).sum(), rows_RD)
            if not torch.isfinite(gradient_RD).all():
                raise RuntimeError("the gradient is not a number")
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise ModelError(
                    f"edits cannot be trained on this model: memory does not suffice for one text of {len(ids)}"
                    " tokens; search with --method searched, or use a larger device or model.quantization=bnb_4bit"
                ) from error
            raise ModelError(
                f"edits cannot be trained on this model, its kernels give no gradient ({first_line(str(error))}):"
                " load it in full precision or with model.quantization=bnb_4bit, or search with --method searched"
            ) from error
        finally:
            engine.editor.clear()
