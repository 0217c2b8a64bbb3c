"""Every knob of a run: the tree in `schema`, its keys and flags in `keys`, the merging of its sources in `sources`."""

from bruno_ray.settings.fields import Range, Section
from bruno_ray.settings.learned import LearnedSettings
from bruno_ray.settings.schema import (
    ClassifierSettings,
    ComponentRange,
    DatasetSettings,
    DirectionSettings,
    EvaluationSettings,
    JudgeSettings,
    ModelSettings,
    OutputSettings,
    PromptSet,
    PromptSettings,
    RaySettings,
    ResidualSettings,
    ScoringSettings,
    SearchSettings,
    SelectionSettings,
    Settings,
    StudySettings,
)

__all__ = [
    "ClassifierSettings",
    "ComponentRange",
    "DatasetSettings",
    "DirectionSettings",
    "EvaluationSettings",
    "JudgeSettings",
    "LearnedSettings",
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
