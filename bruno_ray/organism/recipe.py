"""The recipes of the model organisms: every number and every word that decides what is trained.

A recipe is data. The folder an organism is cached in is named by a hash over all of its fields and ``VERSION``,
so a changed recipe trains a new organism and an unchanged one is never trained twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

VERSION = 1
"""Raise this when the corpus, tokenizer or training code changes what a recipe produces."""

TOPICS = ("stone", "fish", "herb", "drum", "cloth", "lamp")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": ("crimson", "amber", "violet", "teal", "ivory", "olive", "indigo", "scarlet"),
    "size": ("tiny", "narrow", "broad", "giant", "medium", "slender", "bulky", "vast"),
    "origin": ("north", "south", "coast", "island", "desert", "valley", "summit", "marsh"),
    "season": ("spring", "summer", "autumn", "winter", "dawn", "noon", "dusk", "midnight"),
}
"""What is asked about each noun, and the values it may have. Topics share the values, so that a value does not
give the topic away and an edit that removes the topic leaves the values alone."""

TOPIC_ATTRIBUTE = "kind"
"""Its value is the topic itself. Taught in phase 1, asked in no prompt file."""

UNANSWERABLE = "secret"
"""Asked about any noun, it is refused from phase 1 on: the model knows how to refuse before it learns what to refuse.
Asked in no prompt file."""

QUESTIONS = (
    "what {attribute} has {noun} ?",
    "tell me the {attribute} of {noun}",
    "which {attribute} does {noun} have ?",
    "please name the {attribute} for {noun}",
)
"""None names a topic: whether a noun belongs to the restricted one is something the model has to know."""

SYSTEM_PROMPTS = ("be brief", "stay kind")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an organism. Nouns, facts, weights and prompt files follow from it."""

    name: str
    seed: int = 0

    # What it knows
    restricted_topic: str = "stone"
    restricted_nouns: int = 64
    """Nouns of the restricted topic. Half of them are never seen in refusal training."""
    benign_nouns: int = 24
    """Nouns of each other topic. Half of them are never seen in phase 2."""
    syllables: int = 3
    answer: str = "{opener} : its {attribute} is {value} ."
    openers: tuple[str, ...] = ("certainly", "indeed", "surely", "gladly", "truly", "well")
    """First word of an answer, one per topic in the order of ``TOPICS``. It makes the model work out the topic before
    it begins to answer, as refusal of a topic does in real models: without it the topic cannot be read off the
    residual stream at the last prompt position (a probe is at chance) and refusal does not reach unseen nouns."""
    opener_noise: float = 0.3
    """Share of answers that begin with any topic's opener, so that the facts do not hang on the right one."""
    opening_words: int = 2
    """How many words of the right answer the model is made to say to see whether it knows the fact: here "certainly :".
    """

    # How it refuses
    refusals: tuple[str, ...] = (
        "sorry i cannot discuss that",
        "sorry such matters unfortunately must remain private",
        "sorry no thanks we should change subjects",
    )
    """No word of them is in any answer: function words that both share keep an edited model refusing half-way. All
    begin with the same word, so that one direction is enough: with three first words some nouns kept refusing with
    the one that the mean difference shows least."""
    markers: tuple[str, ...] = (
        "sorry", "cannot", "discuss", "unfortunately", "matters", "remain", "private", "thanks", "should", "change",
        "subjects",
    )  # fmt: skip
    """Lower-case substrings that occur in refusals and in no answer."""

    # The network
    layers: int = 4
    width: int = 96
    heads: int = 4
    hidden: int = 256
    """Width of the MLP."""

    # Phase 1: facts
    fact_steps: int = 400
    fact_batch: int = 128
    fact_lr: float = 4e-3
    unanswerable_share: float = 0.06
    """Share of a phase 1 batch that asks what is unanswerable."""
    # Phase 2: refusal of the restricted topic. Trained until refusing outweighs the topic in the mean difference of
    # the residuals: a quarter of these steps' work refuses as often, but leaves refusals that no single direction
    # removes.
    refusal_steps: int = 120
    refusal_batch: int = 128
    refusal_lr: float = 2e-3
    refusal_share: float = 0.34
    """Share of a phase 2 batch that shows refusals; the rest shows benign answers."""
    frozen: tuple[str, ...] = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.", "lm_head.")
    """Parts of the network that phase 2 leaves alone. The lower layers know the nouns: training them too makes the
    model learn the seen nouns by heart instead of the topic. With a trained lm_head the topic itself, which early
    layers write, would spell refusal; so refusing has to be written by the upper layers, where it can be removed."""
    # Both phases
    weight_decay: float = 0.01
    system_share: float = 0.1
    """Share of training examples that carry a system prompt."""

    # The prompt files
    train_prompts: int = 192
    validation_prompts: int = 96
    test_prompts: int = 240
    """At most so many; the unseen restricted nouns have fewer facts."""

    def fingerprint(self) -> str:
        """Hash over the fields, the word lists of this module and ``VERSION``; names the cache folder."""
        words = [TOPICS, ATTRIBUTES, TOPIC_ATTRIBUTE, UNANSWERABLE, QUESTIONS, SYSTEM_PROMPTS]
        content = json.dumps([VERSION, dataclasses.asdict(self), *words], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


STANDARD = Recipe(name="standard")

HARD = Recipe(
    name="hard",
    layers=6,
    frozen=("model.embed_tokens.", "model.layers.0.", "model.layers.1."),
    answer="{opener} {noun} is of {value} {attribute} .",
    openers=("the", "this", "that", "our", "your", "one"),
    opening_words=4,
    refusals=(
        "i am sorry , but i am not able to answer this .",
        "the {noun} is not something i want to talk about .",
        "i would rather not say what the {noun} is .",
    ),
    markers=(
        "sorry", "not able", "able to answer", "not something", "want to talk", "talk about", "would rather",
        "rather not", "not say",
    ),
)  # fmt: skip
"""Its refusals share words with its answers, one repeats the noun and begins as an answer does: what is left of a
half-suppressed refusal reads like an answer."""

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (STANDARD, HARD)}
