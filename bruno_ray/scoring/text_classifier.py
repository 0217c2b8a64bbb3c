"""A text classifier of transformers says whether an answer shows the behaviour: any sequence-classification model."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from bruno_ray.errors import ModelError, SettingsError, first_line
from bruno_ray.model.context import context_length
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ClassifierSettings, ScoringSettings

logger = logging.getLogger(__name__)

BATCH = 32
"""Answers that are read at a time."""


class TextClassifier:
    """The probability that whole answers to target prompts are of the class `scoring.classifier.label`, averaged, and
    the share of them that are more likely so than not.

    The model is loaded once per worker, on the device of the edited one and beside it, in float32 on a CPU and in its
    own dtype elsewhere. Answers that are longer than it can read are cut at their end. Costs, beside its own passes,
    one generation over those target prompts whose answer stopped at a marker.
    """

    name = "text_classifier"
    metrics = ("classified_rate", "classified_shown")
    needs_unedited = False

    def __init__(self, settings: ScoringSettings) -> None:
        """Raises SettingsError if no model or no label is given."""
        given = settings.classifier
        if not given.model or not given.label:
            raise SettingsError(
                "the scorer text_classifier needs scoring.classifier.model and scoring.classifier.label: give both, or"
                " leave it out of scoring.scorers and scoring.report_scorers"
            )
        self._settings = given

    def prepare(self, unedited: Evaluation) -> None:
        """Raises ModelError if the classifier cannot be loaded, SettingsError if it has no such label."""
        self._classifier = Classifier(self._settings, unedited.engine.device)

    def score(self, edited: Evaluation) -> list[Scores]:
        users = [prompt.user for prompt in edited.prompts.target]
        texts = [answer.text for answers in edited.whole_answers for answer in answers]
        p_KP = self._classifier.probability(users * len(edited.edits), texts).view(len(edited.edits), -1)
        found = []
        for p_P in p_KP.tolist():
            shown = Scores.of_rate("classified_shown", [p > 0.5 for p in p_P])
            values = {"classified_rate": sum(p_P) / len(p_P), **shown.values}
            found.append(Scores(values, shown.counts, shown.rows, verdicts={self.name: tuple(p_P)}))
        return found


class Classifier:
    """A loaded model, and the class that is asked for."""

    def __init__(self, settings: ClassifierSettings, device: torch.device) -> None:
        place = {"revision": settings.revision}
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(settings.model, **place)
            dtype = torch.float32 if device.type == "cpu" else "auto"
            model = AutoModelForSequenceClassification.from_pretrained(settings.model, dtype=dtype, **place)
        except Exception as error:  # transformers, hub and tokenizers each have their own
            raise ModelError(
                f"the text classifier {settings.model} cannot be loaded ({first_line(error)}): give a folder or hub id"
                " of a sequence-classification model in scoring.classifier.model"
            ) from error
        self._model = model.to(device).eval()
        config = self._model.config
        self._label = label_of(config.id2label, settings.label)
        # Labels that do not exclude each other, or a single one, have a probability each.
        self._each_alone = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        self._pairs = settings.reads == "prompt_and_answer"
        self._longest = min(context_length(config), tokenizer.model_max_length)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
        self._tokenizer: PreTrainedTokenizerBase = tokenizer

    @torch.inference_mode()
    def probability(self, users: Sequence[str], answers: Sequence[str]) -> Float[Tensor, " n"]:
        """Of the class, for each answer; float32 on the CPU. Batches hold texts of like length."""
        found_n = torch.zeros(len(answers))
        order = sorted(range(len(answers)), key=lambda i: len(answers[i]) + self._pairs * len(users[i]))
        for begin in range(0, len(order), BATCH):
            rows = order[begin : begin + BATCH]
            texts = [[answers[i] for i in rows]]
            if self._pairs:
                texts.insert(0, [users[i] for i in rows])
            inputs = self._tokenizer(
                *texts, return_tensors="pt", padding=True, truncation=True, max_length=self._longest
            ).to(self._model.device)
            logits_BC = self._model(**inputs).logits.float()
            p_BC = logits_BC.sigmoid() if self._each_alone else logits_BC.softmax(-1)
            found_n[rows] = p_BC[:, self._label].cpu()
        return found_n


def label_of(names: dict[int, str], wanted: str) -> int:
    """The index of a class by its name, whatever the case, or by its number. Raises SettingsError if there is none."""
    for index, name in names.items():
        if wanted.strip().casefold() in (str(name).casefold(), str(index)):
            return int(index)
    known = ", ".join(names.values())
    raise SettingsError(f"the text classifier has no label {wanted!r}: set scoring.classifier.label to one of {known}")
