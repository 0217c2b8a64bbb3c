"""Edits of bruno-ray on vLLM. vLLM finds ``register`` through the entry-point group ``vllm.general_plugins`` and calls
it in each of its processes; nothing here needs to be imported by hand."""

__version__ = "0.1.0"

LOAD_FORMAT = "bruno_ray"
"""``vllm serve FOLDER --load-format bruno_ray``"""


def register() -> None:
    """Make the load format known to vLLM. Can be called more than once."""
    from vllm.model_executor import model_loader

    from bruno_ray_vllm.loader import EditedModelLoader

    # vLLM has no public list of load formats, and warns where one is registered again.
    known = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    if known.get(LOAD_FORMAT) is not EditedModelLoader:
        model_loader.register_model_loader(LOAD_FORMAT)(EditedModelLoader)
