"""Saved models on vLLM instead of our own engine, through ``ray.serve.llm``: an extra, for one model at full speed.

    pip install "ray[serve,llm]"
    serve run serve.vllm:build models=runs/mine/model

A saved model has its edit in its weights, so any server can run it. Trials that were not saved, the evaluations and
the chat page need our own engine (``serve.app:build``).
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from bruno_ray.errors import SettingsError
from serve.catalog.catalog import Catalog
from serve.settings import Names


class VllmArgs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    models: Names
    """Folders of saved models, or folders that hold such folders."""

    max_replicas: PositiveInt = 1
    """Copies of each model when there is much to do."""

    tensor_parallel_size: PositiveInt = 1
    """GPUs that one copy is spread over."""

    max_model_len: PositiveInt | None = None
    """Tokens of prompt and answer; when not given, what the model was made for."""


def llm_configs(args: VllmArgs) -> list[dict[str, Any]]:
    """What ``ray.serve.llm.LLMConfig`` is made of, one per model. Raises SettingsError if a folder is broken."""
    catalog = Catalog.discover((), args.models, Path())
    if catalog.problems or not catalog.engines:
        reasons = "; ".join(f"{problem.id}: {problem.reason}" for problem in catalog.problems)
        raise SettingsError(f"vLLM cannot serve this: {reasons or 'no models were given'}")
    engine: dict[str, Any] = {"tensor_parallel_size": args.tensor_parallel_size}
    if args.max_model_len is not None:
        engine["max_model_len"] = args.max_model_len
    return [
        {
            "model_loading_config": {"model_id": model.key, "model_source": model.settings.id},
            "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": args.max_replicas}},
            "engine_kwargs": engine,
        }
        for model in catalog.engines.values()
    ]


def build(args: VllmArgs) -> Any:
    """An OpenAI-compatible application of Ray Serve LLM. Raises SettingsError without the extra."""
    configs = llm_configs(args)
    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise SettingsError(
            f'serving through vLLM needs an extra ({error}): pip install "ray[serve,llm]", or use serve.app:build'
        ) from error
    return build_openai_app({"llm_configs": [LLMConfig(**config) for config in configs]})
