"""What the page knows about the served models: choices for the pickers, markers, the rows of a Pareto front."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from serve.pages.chat.client import Api, ApiError


@dataclass(frozen=True)
class Models:
    """What may be chosen, as ``GET /v1/models`` and ``GET /api/config`` tell it."""

    choices: list[tuple[str, str]] = field(default_factory=list)
    """(label, model id)."""

    kinds: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    markers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    async def fetch(cls, api: Api, key: str) -> "Models":
        """Raises ApiError, also when the key is wrong."""
        entries = (await api.get("/v1/models", key))["data"]
        config = await api.get("/api/config", key)
        served = [entry for entry in entries if not _about(entry).get("problem")]
        return cls(
            choices=[(label(entry["id"], _about(entry)), entry["id"]) for entry in served],
            kinds={entry["id"]: _about(entry).get("kind", "") for entry in served},
            runs=list(config["runs"]),
            markers=sorted({marker for run in config["runs"].values() for marker in run["markers"]}),
            problems=[f"{entry['id']}: {problem}" for entry in entries if (problem := _about(entry).get("problem"))],
        )

    def default(self, wanted: str | None, *kinds: str) -> str | None:
        """``wanted`` if there is such a model, else the first model of the first of ``kinds`` there is one of."""
        if wanted:  # may be a trial that is served without being listed
            return wanted
        for kind in kinds:
            for model, its_kind in self.kinds.items():
                if its_kind == kind:
                    return model
        return next(iter(self.kinds), None)


def _about(entry: dict[str, Any]) -> dict[str, Any]:
    return entry.get("bruno") or {}


def label(model: str, about: dict[str, Any]) -> str:
    """The model's id with what it is and what it scored, for a picker."""
    kind = about.get("kind")
    what = {"base": "unedited", "saved": "saved model", "run": "selected trial"}.get(kind, "")
    if kind == "run" and about.get("trial") is not None:
        what = f"selected trial {about['trial']}"
    metrics = about.get("metrics") or {}
    parts = [what, *(f"{SHORT.get(name, name)} {number(metrics[name])}" for name in SHORT if name in metrics)]
    text = ", ".join(filter(None, parts))
    return f"{model} - {text}" if text else model


SHORT = {"behaviour_rate": "behaviour", "kl_divergence": "KL"}


def number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Front:
    """A run's Pareto front as a table. The first column is the trial's number, the last the id of its model."""

    headers: list[str]
    rows: list[list[Any]]

    @classmethod
    async def fetch(cls, api: Api, key: str, run: str) -> "Front":
        front = await api.get("/api/front", key, urlencode({"run": run}))
        names = front["objectives"]
        rows = []
        for row in front["rows"]:
            counts = row["counts"]
            values = [_value(row["values"].get(name), counts.get(name)) for name in names]
            rows.append([row["trial"], *values, row["description"], row["model"]])
        return cls(["trial", *(name.replace("_", " ") for name in names), "edit", "model"], rows)


def _value(value: Any, count: Any) -> str:
    return f"{count[0]}/{count[1]}" if count else number(value)


async def stats_line(api: Api, key: str) -> str:
    """One line per engine: speed, rows, memory."""
    try:
        stats = await api.get("/api/stats", key)
    except ApiError as error:
        return str(error)
    return "\n".join(engine_line(name, engine) for name, engine in stats["engines"].items())


def engine_line(name: str, engine: dict[str, Any]) -> str:
    if not engine["replicas"]:
        return f"{name}: loading"
    parts = [
        f"{engine['tokens_per_second']:.0f} tokens/s",
        f"{engine['running']} running",
        f"{engine['waiting']} waiting",
        f"memory {engine['memory_bytes'] / 2**20:,.0f} MiB",
    ]
    return f"{name}: " + ", ".join(parts)
