"""Nouns, facts and prompts of an organism, made from its recipe. Pure Python, deterministic given the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .recipe import ATTRIBUTES, QUESTIONS, SYSTEM_PROMPTS, TOPIC_ATTRIBUTE, TOPICS, UNANSWERABLE, Recipe

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvwz" for vowel in "aeiou")


@dataclass(frozen=True)
class Fact:
    """One noun has one value for one attribute."""

    noun: str
    topic: str
    attribute: str
    value: str


@dataclass(frozen=True)
class Row:
    """One line of a prompt file: what is asked, and the answer that is right."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """All that is taught. ``seen`` nouns occur in phase 2, ``unseen`` ones in phase 1 only."""

    recipe: Recipe
    topics: dict[str, str]
    """Noun to topic."""
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    facts: tuple[Fact, ...]
    """Attributes of single nouns: what is asked in every prompt file."""
    topic_facts: tuple[Fact, ...]
    """The topic of each noun: taught, never asked in a prompt file."""
    unanswerable: tuple[Fact, ...]
    """What is refused for every noun; the value is empty."""

    def facts_of(self, nouns: Sequence[str], restricted: bool) -> list[Fact]:
        """Facts of those ``nouns`` that do, or do not, belong to the restricted topic."""
        chosen = set(nouns)
        return [
            fact
            for fact in self.facts
            if fact.noun in chosen and (fact.topic == self.recipe.restricted_topic) == restricted
        ]

    def answer(self, fact: Fact, opener: str | None = None) -> str:
        """The right answer, beginning with the topic's opener unless another is given."""
        opener = opener or self.recipe.openers[TOPICS.index(fact.topic)]
        return self.recipe.answer.format(opener=opener, attribute=fact.attribute, noun=fact.noun, value=fact.value)

    def question(self, fact: Fact, phrasing: int) -> str:
        return QUESTIONS[phrasing % len(QUESTIONS)].format(attribute=fact.attribute, noun=fact.noun)

    def row(self, fact: Fact, phrasing: int) -> Row:
        return Row(self.question(fact, phrasing), self.answer(fact))


def make_corpus(recipe: Recipe) -> Corpus:
    """Draw the nouns and their facts, and decide which nouns phase 2 may see."""
    generator = random.Random(recipe.seed)
    counts = {
        topic: recipe.restricted_nouns if topic == recipe.restricted_topic else recipe.benign_nouns for topic in TOPICS
    }
    nouns = _draw_nouns(generator, sum(counts.values()), recipe.syllables)
    topics: dict[str, str] = {}
    seen: list[str] = []
    unseen: list[str] = []
    for topic, count in counts.items():
        members = [nouns.pop() for _ in range(count)]
        topics.update(dict.fromkeys(members, topic))
        seen += members[: count // 2]
        unseen += members[count // 2 :]
    facts = [
        Fact(noun, topic, attribute, generator.choice(values))
        for noun, topic in topics.items()
        for attribute, values in ATTRIBUTES.items()
    ]
    return Corpus(
        recipe,
        topics,
        seen=tuple(seen),
        unseen=tuple(unseen),
        facts=tuple(facts),
        topic_facts=tuple(Fact(noun, topic, TOPIC_ATTRIBUTE, topic) for noun, topic in topics.items()),
        unanswerable=tuple(Fact(noun, topic, UNANSWERABLE, "") for noun, topic in topics.items()),
    )


def _draw_nouns(generator: random.Random, count: int, syllables: int) -> list[str]:
    nouns: dict[str, None] = {}
    while len(nouns) < count:
        nouns["".join(generator.choice(SYLLABLES) for _ in range(syllables))] = None
    return list(nouns)


def prompt_parts(corpus: Corpus) -> dict[str, list[Row]]:
    """The six prompt files: ``target`` (restricted) and ``baseline`` (benign), each train, validation and test.

    Two thirds of the seen nouns go to train, the rest to validation, and the unseen ones to test, so that no noun is
    in two parts. In test every fact is asked at most once, which keeps the rows of a rate distinct facts.
    """
    generator = random.Random(f"{corpus.recipe.seed}-prompts")
    parts: dict[str, list[Row]] = {}
    for kind, restricted in (("target", True), ("baseline", False)):
        seen = [noun for noun in corpus.seen if (corpus.topics[noun] == corpus.recipe.restricted_topic) == restricted]
        generator.shuffle(seen)
        cut = 2 * len(seen) // 3
        for part, nouns, size in (
            ("train", seen[:cut], corpus.recipe.train_prompts),
            ("validation", seen[cut:], corpus.recipe.validation_prompts),
            ("test", corpus.unseen, corpus.recipe.test_prompts),
        ):
            facts = corpus.facts_of(nouns, restricted)
            generator.shuffle(facts)
            rounds = 1 if part == "test" else len(QUESTIONS)
            first = generator.randrange(len(QUESTIONS))
            rows = [corpus.row(fact, first + i + k) for k in range(rounds) for i, fact in enumerate(facts)]
            parts[f"{kind}_{part}"] = rows[:size]
    return parts


def vocabulary(recipe: Recipe) -> list[str]:
    """Every word and mark a prompt or an answer may contain, nouns excepted, in order of first use."""
    sentences = [
        *QUESTIONS, *SYSTEM_PROMPTS, recipe.answer, *recipe.openers, *recipe.refusals, *ATTRIBUTES, TOPIC_ATTRIBUTE,
        UNANSWERABLE, *TOPICS,
    ]  # fmt: skip
    for values in ATTRIBUTES.values():
        sentences += values
    words: dict[str, None] = {}
    for sentence in sentences:
        words.update(dict.fromkeys(word for word in sentence.split() if not word.startswith("{")))
    return list(words)
