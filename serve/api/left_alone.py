"""Fields that clients send and that do not change the text here: read and left alone, whatever is in them.

Samplers that this server does not have are let in where they are switched off (``OFF``), and refused by name where they
are not.
"""

from typing import Any

from pydantic import model_validator

from serve.api.fields import Request, Unsupported

OFF: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repeat_penalty": (1,),
    "skip_special_tokens": (True,),
    "smoothing_factor": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "typical": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
"""Fields of other servers -> values with which they change nothing."""


class GenerationExtras(Request):
    """Of a request that generates."""

    user: Any = None
    """Read and left alone, as are the next ones."""

    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    reasoning: Any = None
    reasoning_effort: Any = None
    include_reasoning: Any = None
    verbosity: Any = None
    cache_prompt: Any = None
    keep_alive: Any = None
    priority: Any = None
    request_id: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in OFF.keys() & data.keys():
            if data[name] is not None and data[name] not in OFF[name]:
                raise Unsupported(name, f"{name} is not supported (only {str(OFF[name][0]).lower()} is)")
        return {name: value for name, value in data.items() if name not in OFF}


class MessageExtras(Request):
    """Of a message. What a model has thought before is not shown to it again."""

    id: Any = None
    """Read and left alone, as are the next ones."""

    opts: Any = None
    cache_control: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None
    thinking_blocks: Any = None
    provider_specific_fields: Any = None
    annotations: Any = None


class ContentExtras(Request):
    """Of a part of a message's content."""

    cache_control: Any = None
    """Read and left alone, as is the next."""

    annotations: Any = None
