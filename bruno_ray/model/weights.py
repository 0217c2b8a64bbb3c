"""The weights of a model: in which dtype it can compute, and whether every one of them came from its files."""

import datetime
import logging
import time
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bruno_ray.errors import ModelError
from bruno_ray.model.batching import input_device, is_out_of_memory
from bruno_ray.model.classes import auto_class
from bruno_ray.model.loading_errors import explained, named
from bruno_ray.model.quantisation import (
    DEQUANTISED_BY_LOADING,
    loading_arguments,
    make_plain,
    stored_format,
    tame_bitsandbytes,
    widen,
)
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.settings import ModelSettings

logger = logging.getLogger(__name__)

SLOWER = 1.2
"""Times float32 from which another dtype is not computed in on a CPU."""

SHOWN = 3
"""Names of tensors that a message lists."""


def load_weights(
    source: str,
    settings: ModelSettings,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    full_precision: bool,
) -> tuple[PreTrainedModel, str]:
    """Try the dtypes in order; one is good when a one-token answer has finite logits.

    ``full_precision`` is for baking and saving: plain weights in the dtype that is stored, whether or not this machine
    can compute with them.
    """
    kind = auto_class(config)
    failures: dict[str, str] = {}
    too_big = 1 << 30  # itemsize of the smallest dtype that ran out of memory
    for wish in settings.dtypes:
        dtype = resolve_dtype(wish, config, None if full_precision else settings)
        name = str(dtype).removeprefix("torch.")
        if name in failures:
            continue
        if dtype.itemsize >= too_big:
            failures[name] = "out of memory before, and this one is no smaller"
            continue
        model = None
        try:
            model, found = kind.from_pretrained(
                source,
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                dtype=dtype,
                device_map=settings.device_map,
                max_memory=max_memory(settings),
                output_loading_info=True,
                **loading_arguments(settings, config, dtype, full_precision=full_precision),
            )
            require_complete(found, settings)
            model.eval().requires_grad_(False)
            stored = stored_format(config)
            if stored in DEQUANTISED_BY_LOADING:
                widen(model, dtype)
            if full_precision and stored:
                model = make_plain(model, settings, stored)
            tame_bitsandbytes(model)
            if not full_precision:
                try_one_token(model, tokenizer, settings)
            return model, name
        except ModelError:
            raise
        except Exception as error:
            # Dtypes fail in many ways (kernels that lack one, overflow, memory); what no dtype mends is raised at once.
            if is_out_of_memory(error):
                too_big = dtype.itemsize
                failures[name] = "out of memory"
            elif isinstance(error, (RuntimeError, FloatingPointError, NotImplementedError)):
                failures[name] = named(error)
            else:
                raise explained(error, settings) from error
            logger.warning("%s cannot run in %s: %s", settings.id, name, failures[name])
        finally:
            model = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    tried = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
    if all("out of memory" in reason for reason in failures.values()):
        raise ModelError(
            f"not enough memory for {settings.id} ({tried}): use model.quantization bnb_4bit, a smaller model,"
            " or raise model.max_memory"
        )
    raise ModelError(f"{settings.id} runs in none of model.dtypes ({tried}): add another dtype or use another model")


def require_complete(found: dict[str, Any], settings: ModelSettings) -> None:
    """Every parameter came from the checkpoint's files, or is tied to one that did, or its class calls it optional.

    transformers draws whatever is missing at random and goes on; each worker would have another model then.

    Raises ModelError that names what is missing.
    """
    missing = sorted(found["missing_keys"])
    mismatched = sorted(name for name, *_ in found["mismatched_keys"])
    for names, what in ((missing, "lacks"), (mismatched, "has other shapes for")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ModelError(
                f"the checkpoint of {settings.id} {what} {len(names)} tensors of the model ({', '.join(names[:SHOWN])}"
                f"{more}), which would be random: download it again, or use a checkpoint of this architecture"
            )
    if found["unexpected_keys"]:
        logger.info(
            "%s has %d tensors that its class does not load, such as %s",
            settings.id,
            len(found["unexpected_keys"]),
            min(found["unexpected_keys"]),
        )


@torch.no_grad()
def try_one_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> None:
    """Answer a greeting with one token and look at the logits before and after it.

    Raises:
        FloatingPointError: the logits are not finite.
        ModelError: no dtype would help: its chat template does not fit the model, or it keeps no key-value cache.
    """
    (ids,) = render(tokenizer, [Prompt("Hello")], date=datetime.date.min)
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None) or len(cast(Tensor, embedding.weight))
    if max(ids) >= rows:
        raise ModelError(
            f"the chat template of {settings.id} uses the token {tokenizer.convert_ids_to_tokens(max(ids))!r} (number"
            f" {max(ids)}), and its embedding has {rows} rows: use a copy whose embedding was resized, or fix its"
            " chat_template"
        )
    given = torch.tensor([ids], device=input_device(embedding))
    try:
        first = model(input_ids=given, use_cache=True)
    except (TypeError, AttributeError, LookupError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{settings.id} ({type(model).__name__}) cannot read a prompt of text alone ({named(error)}): use a model"
            " that chats in text"
        ) from error
    if getattr(first, "past_key_values", None) is None:
        raise ModelError(
            f"{settings.id} ({type(model).__name__}) keeps no key-value cache, and answers are written with one: use a"
            " model with attention"
        )
    token = first.logits[:, -1:].argmax(-1)
    second = model(input_ids=token.to(given.device), past_key_values=first.past_key_values, use_cache=True)
    if not (first.logits[:, -1].isfinite().all() and second.logits.isfinite().all()):
        raise FloatingPointError("logits are not finite")


def resolve_dtype(wish: str, config: PreTrainedConfig, settings: ModelSettings | None = None) -> torch.dtype:
    """``auto`` is the dtype that is stored. With ``settings``, for computing: on a CPU that has no instructions for
    bfloat16 it is float32, which is the same numbers, many times faster."""
    if wish != "auto":
        return getattr(torch, wish)
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    stored = stored if stored in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16
    on_cpu = settings is not None and (settings.device_map == "cpu" or not torch.cuda.is_available())
    return torch.float32 if on_cpu and stored != torch.float32 and _is_slow(stored) else stored


@cache
def _is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices more slowly in ``dtype`` than in float32: measured, in milliseconds."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    slow = seconds(dtype) > SLOWER * seconds(torch.float32)
    if slow:
        logger.info("this CPU is slow in %s: computing in float32", str(dtype).removeprefix("torch."))
    return slow


def max_memory(settings: ModelSettings) -> dict[int | str, str] | None:
    """Accelerate wants GPU numbers as integers; configuration files can only say strings."""
    if settings.max_memory is None:
        return None
    return {int(key) if key.isdigit() else key: value for key, value in settings.max_memory.items()}
