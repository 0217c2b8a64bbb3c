"""What a study's results depend on: two runs may share a study only if they agree in it."""

import re
from typing import Any

from bruno_ray.settings import SearchSettings, Settings

NOT_OF_THE_SEARCH = {"row_tokens", "report_tokens", "report_scorers", "reasoning_tokens", "judge"}
"""Settings of scoring that change no trial's scores."""

_SEARCH = SearchSettings().model_dump(mode="json")

LATER = {
    "kernels": ["linear"],
    "protect_strengths": [0.5, 1.0],
    "protect_rank": 8,
    "protect_ridge": 0.01,
    "opened_positions": [],
    "classifier": {"model": "", "revision": None, "label": "", "reads": "answer"},
} | {
    name: _SEARCH[name]
    for name in (
        *("further", "router", "attention_input", "mlp_input", "addition", "experts", "heads", "heads_share"),
        "require",
    )
}
"""Settings that are younger than studies which may be resumed, with what says the same as their absence. Protected
prompts are in the fingerprint of all prompts."""


def study_fingerprint(settings: Settings, info: Any, prompts_fingerprint: str) -> dict[str, Any]:
    """As stored with a study, nested dicts of plain values.

    Seeds, numbers of trials and workers, batch sizes and places may differ, and how edits are trained: each trained
    trial keeps its plan, and a search may be gone on with by training. The model's id is noted for people: what
    counts is the fingerprint of its content, since a folder may be renamed, or lie elsewhere on another machine.

    Args:
        info: ``ModelInfo``.
    """
    dump = settings.model_dump(mode="json")
    return {
        "model": {
            "id": settings.model.id,
            "fingerprint": info.fingerprint,
            "dtype": info.dtype,
            "quantization": settings.model.quantization,
        },
        "prompts": prompts_fingerprint,
        "settings": {
            "residuals": {name: dump["residuals"][name] for name in ("max_tokens", "answer_tokens")},
            "directions": _without_later(dump["directions"]),
            "search": _without_later(dump["search"] | {"require": []}),  # which changes no edit
            "scoring": _without_later(
                {name: value for name, value in dump["scoring"].items() if name not in NOT_OF_THE_SEARCH}
            ),
            "response_prefix": dump["prompts"]["response_prefix"],
        },
    }


def _without_later(section: dict[str, Any]) -> dict[str, Any]:
    """Settings that older versions did not have say nothing at the value that was theirs: such studies can go on."""
    return {name: value for name, value in section.items() if LATER.get(name, ...) != value}


def same_model(stored: str, mine: str) -> bool:
    """Whether two fingerprints are of one model. Those of older runs lack the digest of loaded tensors at the end, and
    do not know the commit of a hub's repository."""
    if "@unknown:" in stored:
        mine = re.sub(r"@[0-9a-f]{40}:", "@unknown:", mine)
    return stored == mine or mine.startswith(f"{stored}:")


def first_difference(stored: dict[str, Any], mine: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """(part, its value in the study, its value here) where two fingerprints first disagree; None if they agree."""
    found = _difference(_content(stored), _content(mine), "")
    if found is None or found[0] != "model.fingerprint":
        return found
    return ("model", *(_named(fingerprint["model"]) for fingerprint in (stored, mine)))


def _content(fingerprint: dict[str, Any]) -> dict[str, Any]:
    model = fingerprint.get("model")
    if not isinstance(model, dict):
        return fingerprint
    return {**fingerprint, "model": {name: value for name, value in model.items() if name != "id"}}


def _named(model: dict[str, Any]) -> str:
    """A model as people know it; equal names are no help without the content's hash."""
    short = re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]+", r"\1", str(model.get("fingerprint")))
    return f"{model.get('id', 'a model')} ({short})"


def _difference(stored: Any, mine: Any, part: str) -> tuple[str, Any, Any] | None:
    if isinstance(stored, dict) and isinstance(mine, dict):
        for key in sorted(stored.keys() | mine.keys()):
            found = _difference(stored.get(key), mine.get(key), f"{part}.{key}" if part else key)
            if found:
                return found
        return None
    if part == "model.fingerprint" and same_model(str(stored), str(mine)):
        return None
    return None if stored == mine else (part, stored, mine)
