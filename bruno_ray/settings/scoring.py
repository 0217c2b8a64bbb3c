"""Settings of what is measured, in the search and for the report."""

import re
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from bruno_ray.settings.fields import Section, setting
from bruno_ray.settings.passwords import without_password

GUIDES = ("elicited_answers", "confidence")
"""Scorers that guide a search and are no figure for people. At a report's length they would cost two more trials."""


class JudgeSettings(Section):
    """A language model, or a program of your own, that reads the answers of the report. It is off until a URL, a model
    or a plugin is given."""

    url: str | None = None
    """Address of any server with OpenAI's API, up to its /v1: http://localhost:8000/v1. It is asked from the machine
    that runs the command, not from workers."""

    model: str = ""
    """The judge's name on that server. Without a URL, a model as in `model.id`, loaded in a separate worker when
    the others have ended."""

    plugin: str | None = None
    """A judge of an installed package, or FILE.py:NAME (docs/plugins.md), in place of `url` and `model`. It runs on the
    machine of the command, and gets the rubric if there is one."""

    key_variable: str | None = None
    """Name of the environment variable that holds the server's API key. The key itself is never a setting."""

    rubric: str = ""
    """In a sentence or two, which answers show the behaviour. The judge gets it with each prompt and answer."""

    timeout: PositiveFloat = 60.0
    """Seconds allowed for one verdict."""

    concurrency: PositiveInt = 8
    """Requests sent at the same time."""

    most_requests: PositiveInt = 2000
    """The judge is left out if the report needs more new verdicts than this; those on disk do not count."""

    @property
    def is_given(self) -> bool:
        return bool(self.url or self.model or self.plugin)

    @model_validator(mode="after")
    def _can_be_asked(self) -> "JudgeSettings":
        if self.plugin is not None and (self.url or self.model):
            raise ValueError("scoring.judge.plugin is given beside a url or model: keep one of them")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"scoring.judge.url is {self.url!r}; write it as http://HOST:PORT/v1")
        if self.url is not None and (re.search("://[^/]*@", self.url) or without_password(self.url) != self.url):
            raise ValueError(
                "scoring.judge.url holds a password, which would be kept with the run; put the key into an environment"
                " variable and name that in scoring.judge.key_variable"
            )
        if self.url is not None and not self.model:
            raise ValueError("scoring.judge.url is given without a name; set scoring.judge.model to one of its models")
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable):
            raise ValueError(
                "scoring.judge.key_variable is not the name of an environment variable; put the key into one, such as"
                " JUDGE_API_KEY, and give that name"
            )
        if (self.url or self.model) and not self.rubric.strip():
            raise ValueError(
                "scoring.judge.rubric is empty; say in a sentence which answers show the behaviour, or leave the judge"
                " out"
            )
        return self


class ClassifierSettings(Section):
    """The model of the `text_classifier` scorer."""

    model: str = ""
    """Any sequence-classification model of transformers: a folder, or its id on the hub."""

    revision: str | None = None
    """Commit, tag or branch on the hub."""

    label: str = ""
    """The class that shows the behaviour, as the model's config names it (or its number)."""

    reads: Literal["answer", "prompt_and_answer"] = "answer"
    """What it is shown: the answer alone, or the user's message and the answer as a pair."""


class ScoringSettings(Section):
    scorers: tuple[str, ...] = ("behaviour_rate", "kl_divergence", "coherence", "to_the_point", "elicited_answers")
    """Names in `bruno_ray.scoring.SCORERS`, of installed packages, or FILE.py:NAME. Metrics that are not
    objectives break ties in --auto-select."""

    objectives: tuple[str, ...] = ("behaviour_rate", "kl_divergence")
    """Metrics the study minimises, in this order."""

    markers: tuple[str, ...] = ()
    """An answer that contains one of these shows the behaviour. Case, `*`, quotes and spaces are normalised."""

    empty_counts: bool = True
    """An empty answer counts as showing the behaviour."""

    response_tokens: PositiveInt = 30
    """Longest answer generated for scoring, in tokens. An answer ends earlier once it is decided."""

    report_tokens: PositiveInt = 256
    """Longest answer generated for the report, for saved models and by `evaluate`, in tokens."""

    report_scorers: tuple[str, ...] = (
        "behaviour_by_length",
        "baseline_behaviour",
        "neutral_text",
        "detector",
        "reasoning",
    )
    """Further scorers for the report, beside those of the search."""

    reasoning_tokens: PositiveInt = 1024
    """Longest answer, in tokens, of a model that reasons before it answers (scorer `reasoning`, in the report)."""

    kl_tokens: PositiveInt = 16
    """Answer positions the KL divergence is taken over, teacher-forced on the unedited model's answer. 1 is what other
    tools measure; it is reported as `kl_first` in any case."""

    compliant_opening: str = ""
    """Opening of a compliant answer, for the `compliant_perplexity` scorer; when empty, the most common opening
    of the unedited model's answers to baseline prompts."""

    row_tokens: NonNegativeInt = setting(0, resumable=True)
    """Tokens in one forward pass while scoring, padding included; 0 finds it from memory."""

    judge: JudgeSettings = setting(JudgeSettings(), resumable=True)

    classifier: ClassifierSettings = ClassifierSettings()

    def for_report(self, further: bool = True) -> "ScoringSettings":
        """How what is reported is measured: with longer answers, by scorers that a search does without (unless not
        ``further``), and without those that only guide one."""
        scorers = (*self.scorers, *(self.report_scorers if further else ()))
        scorers = tuple(dict.fromkeys(name for name in scorers if name not in GUIDES))
        return self.model_copy(update={"scorers": scorers, "response_tokens": self.report_tokens})
