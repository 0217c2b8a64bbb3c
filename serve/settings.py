"""Settings of serving: what is served, to whom, and how much at a time. Importable without torch or Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


@dataclass(frozen=True)
class EngineSettings:
    """How much one model copy takes on at a time."""

    max_rows: int = 64
    """Answers that are generated at the same time."""

    max_waiting: int = 256
    """Requests beyond those; more are refused."""

    kv_tokens: int = 0
    """Room for keys and values, in tokens, padding included; 0 takes a share of the free memory."""

    max_context: int = 0
    """Tokens of prompt and answer; 0 is what the model was made for."""

    prefill_tokens: int = 2048
    """Prompt tokens, padding included, that are read between two steps of the running answers."""


def _listed(value: Any) -> Any:
    """`serve run` gives every argument as text: a comma separates the entries of a list."""
    return [entry for entry in value.split(",") if entry] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class ServeArgs(BaseModel):
    """Arguments of ``serve.app:build``: key=value for ``serve run``, under ``args`` in config.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: Names = ()
    """Run directories, or names of runs below ``output_directory``. A comma separates several on the command line."""

    models: Names = ()
    """Folders of saved models, folders that hold such folders, or Hugging Face ids."""

    output_directory: Path = Path("runs")
    """Where runs are looked for by name."""

    quantization: Literal["none", "bnb_4bit", "bnb_8bit"] = "none"
    """Of ``models``. The base model of a run is loaded as its search did."""

    lean_forward: Literal["auto", "off"] = "auto"
    """`auto`: a run's base as its search was told to, all others with a faster forward pass of our own where it gives
    the model's own logits. `off`: always transformers' own."""

    require_key: bool = True
    """Whether requests need ``Authorization: Bearer KEY``. Switch it off only where nobody else can connect."""

    keys_file: Path | None = None
    """One key a line, as ``printf %s KEY | sha256sum`` prints it. BRUNO_API_KEY in the environment is one more key."""

    cors_origins: Names = ("local",)
    """Web pages that may use the API from a browser, such as ``https://chat.example.org``. ``local`` stands for those
    of this machine, at any port; ``*`` for all there are."""

    max_body_bytes: PositiveInt = 4 * 2**20
    """Larger requests are refused before they are read."""

    request_timeout_s: PositiveFloat = 600.0
    """Longest time one request may take, waiting included."""

    default_max_tokens: PositiveInt = 2048
    """Length of an answer whose request does not say; the room left in the context if that is less."""

    max_answers: PositiveInt = 128
    """Most answers to one request: prompts times n."""

    max_requests: PositiveInt = 1024
    """Generating requests that one API replica holds at a time."""

    api_replicas: PositiveInt = 1
    """Processes that speak HTTP and tokenise. One is enough for several hundred streams. More than one needs
    ``pages`` off: the pages' sessions live in one process."""

    api_on_head: bool = True
    """Keep the API on the head node, where runs and models are read from local folders."""

    listen: str | None = None
    """HOST:PORT where the API speaks HTTP itself, past Serve's proxy, which takes about a millisecond for each piece
    of an answer. `bruno-ray serve` does so on a cluster of its own. Replicas of the API share the port."""

    route_prefix: str = "/"
    """Path that everything is below at ``listen``."""

    min_replicas: PositiveInt = 1
    """Copies of each base model that are always there."""

    max_replicas: PositiveInt = 1
    """Copies of each base model when there is much to do."""

    target_ongoing_requests: PositiveFloat = 32.0
    """Requests per copy, running and waiting, that the number of copies is held at."""

    gpus_per_replica: NonNegativeFloat | None = None
    """When not given, 1 if the cluster has any, else 0."""

    cpus_per_replica: PositiveFloat = 1.0
    """CPUs of one copy, also its torch thread count (at least 1)."""

    engine: EngineSettings = Field(default_factory=EngineSettings)
    """Of each copy."""

    pages: bool = True
    """Serve the chat page and the studies' pages as well."""

    @model_validator(mode="after")
    def _pages_have_one_process(self) -> "ServeArgs":
        if self.pages and self.api_replicas > 1:
            raise ValueError("api_replicas above 1 needs pages=false: the pages' sessions live in one process")
        return self
