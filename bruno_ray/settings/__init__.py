"""Every knob of a run: the tree in `schema`, its keys and flags in `keys`, the merging of its sources in `sources`."""

from bruno_ray.settings.fields import Range, Section
from bruno_ray.settings.learned import LearnedSettings
from bruno_ray.settings.prompts import DatasetSettings, PromptSet, PromptSettings
from bruno_ray.settings.schema import (
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    RaySettings,
    SelectionSettings,
    Settings,
    StudySettings,
)
from bruno_ray.settings.scoring import ClassifierSettings, JudgeSettings, ScoringSettings
from bruno_ray.settings.search import ComponentRange, DirectionSettings, ResidualSettings, SearchSettings

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
