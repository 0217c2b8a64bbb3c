"""Every knob of a run: the tree in `schema`, its keys and flags in `keys`, the merging of sources in `sources`."""

from bruno_ray.settings.schema import (
    ComponentRange,
    DatasetSettings,
    DirectionSettings,
    ModelSettings,
    OutputSettings,
    PromptSet,
    PromptSettings,
    Range,
    RaySettings,
    ResidualSettings,
    ScoringSettings,
    SearchSettings,
    Section,
    SelectionSettings,
    Settings,
    StudySettings,
)

__all__ = [
    "ComponentRange",
    "DatasetSettings",
    "DirectionSettings",
    "ModelSettings",
    "OutputSettings",
    "PromptSet",
    "PromptSettings",
    "Range",
    "RaySettings",
    "ResidualSettings",
    "ScoringSettings",
    "SearchSettings",
    "Section",
    "SelectionSettings",
    "Settings",
    "StudySettings",
]
