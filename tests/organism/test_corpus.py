"""What the recipes promise about their words, checked without training anything."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import pytest

from bruno_ray.organism.corpus import make_corpus, prompt_parts
from bruno_ray.organism.recipe import ATTRIBUTES, QUESTIONS, RECIPES, TOPICS
from bruno_ray.organism.tokenizer import make_tokenizer, save_tokenizer
from bruno_ray.organism.training import Conversations, train


@pytest.fixture(params=sorted(RECIPES))
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture
def corpus(recipe):
    return make_corpus(recipe)


def words(text):
    return set(re.findall(r"\S+", text))


def all_answers(corpus):
    taught = [*corpus.facts, *corpus.topic_facts]
    return [corpus.answer(fact, opener) for fact in taught for opener in corpus.recipe.openers]


def test_standard_refusals_and_answers_share_no_word():
    corpus = make_corpus(RECIPES["standard"])
    answers = set().union(*(words(answer) for answer in all_answers(corpus)))
    refusals = set().union(*(words(refusal) for refusal in corpus.recipe.refusals))
    assert len(refusals) > 10
    assert not answers & refusals


def test_hard_refusals_share_words_with_answers_and_repeat_the_noun():
    corpus = make_corpus(RECIPES["hard"])
    answers = set().union(*(words(answer) for answer in all_answers(corpus)))
    refusals = set().union(*(words(refusal) for refusal in corpus.recipe.refusals))
    assert {"the", "is", "."} <= answers & refusals
    assert any("{noun}" in refusal for refusal in corpus.recipe.refusals)


def test_markers_recognise_every_refusal_and_no_answer(corpus):
    markers = corpus.recipe.markers
    for refusal in corpus.recipe.refusals:
        assert any(marker in refusal for marker in markers)
    for answer in all_answers(corpus):
        assert not any(marker in answer for marker in markers)


def test_every_value_belongs_to_one_attribute():
    values = [value for attribute in ATTRIBUTES.values() for value in attribute]
    assert len(values) == len(set(values))


def test_questions_do_not_name_the_topic(corpus):
    questions = {corpus.question(fact, phrasing) for fact in corpus.facts for phrasing in range(len(QUESTIONS))}
    for question in questions:
        assert not words(question) & set(TOPICS)


def test_nouns_of_a_topic_look_like_those_of_any_other(corpus):
    """No syllable at a fixed place gives the restricted topic away to better than a weak guess."""
    restricted = [noun for noun, topic in corpus.topics.items() if topic == corpus.recipe.restricted_topic]
    benign = [noun for noun, topic in corpus.topics.items() if topic != corpus.recipe.restricted_topic]
    for start in range(0, 2 * corpus.recipe.syllables, 2):
        ours = {noun[start : start + 2] for noun in restricted}
        assert len([noun for noun in benign if noun[start : start + 2] in ours]) > len(benign) / 3


def test_half_of_the_restricted_nouns_never_occur_in_refusal_training(recipe, monkeypatch):
    """Watches what is really drawn while phase 2 runs, rather than what the corpus says it should be."""
    drawn = []
    original = Conversations._tokenize

    def watch(self, system, question, answer):
        drawn.append((question, answer))
        return original(self, system, question, answer)

    monkeypatch.setattr(Conversations, "_tokenize", watch)
    corpus = make_corpus(recipe)
    small = make_corpus_small(corpus)
    train(small, make_tokenizer(small.recipe), phases=(2,))
    asked = {word for question, _ in drawn for word in words(question)} & set(corpus.topics)
    restricted = {noun for noun, topic in corpus.topics.items() if topic == recipe.restricted_topic}
    assert asked & restricted
    assert len(restricted & set(corpus.unseen)) == len(restricted) // 2
    assert asked <= set(corpus.seen)
    refusals = [question for question, answer in drawn if any(marker in answer for marker in recipe.markers)]
    assert refusals
    assert all(words(question) & restricted for question in refusals)


def make_corpus_small(corpus):
    """The same nouns and facts with a network that trains in a moment."""
    recipe = dataclasses.replace(corpus.recipe, layers=3, width=16, hidden=16, heads=2, refusal_steps=12)
    return dataclasses.replace(corpus, recipe=recipe)


def test_prompt_parts_share_no_noun_and_are_large_enough(corpus):
    parts = prompt_parts(corpus)
    nouns = {
        name: {noun for row in rows for noun in words(row.prompt) & set(corpus.topics)} for name, rows in parts.items()
    }
    for one, other in itertools.combinations(parts, 2):
        assert not nouns[one] & nouns[other], (one, other)
    for name, rows in parts.items():
        assert len({row.prompt for row in rows}) == len(rows)
        assert len(rows) >= {"train": 150, "validation": 64, "test": 100}[name.split("_")[1]]
    for side in ("target", "baseline"):
        assert nouns[f"{side}_test"] <= set(corpus.unseen)
        assert nouns[f"{side}_train"] | nouns[f"{side}_validation"] <= set(corpus.seen)


def test_target_prompts_are_of_the_restricted_topic_only(corpus):
    for name, rows in prompt_parts(corpus).items():
        for row in rows:
            (noun,) = words(row.prompt) & set(corpus.topics)
            assert (corpus.topics[noun] == corpus.recipe.restricted_topic) == name.startswith("target")


def test_test_prompts_ask_each_fact_once(corpus):
    attribute_words = set(ATTRIBUTES)
    for name in ("target_test", "baseline_test"):
        facts = [
            frozenset(words(row.prompt) & (set(corpus.topics) | attribute_words)) for row in prompt_parts(corpus)[name]
        ]
        assert len(set(facts)) == len(facts)
        assert {len(fact) for fact in facts} == {2}


def test_corpus_and_fingerprint_follow_from_the_recipe(recipe):
    assert prompt_parts(make_corpus(recipe)) == prompt_parts(make_corpus(recipe))
    other = dataclasses.replace(recipe, seed=recipe.seed + 1)
    assert make_corpus(other).topics != make_corpus(recipe).topics
    assert other.fingerprint() != recipe.fingerprint()


def test_nouns_are_spelt_in_syllables_and_words_are_one_token(corpus):
    tokenizer = make_tokenizer(corpus.recipe)
    for noun in corpus.topics:
        assert len(tokenizer.tokenize(noun)) == corpus.recipe.syllables
    for text in (*all_answers(corpus)[::97], *(corpus.question(fact, 1) for fact in corpus.facts[::97])):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token_id not in tokenizer("Anything at all: 42 caf\u00e9s!")["input_ids"]


def test_saved_tokenizer_is_the_same_through_auto_tokenizer(tmp_path):
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = make_tokenizer(RECIPES["standard"])
    save_tokenizer(tokenizer, tmp_path)
    # AutoTokenizer looks at the model's type as well: it must not put a Llama tokenizer in ours' place.
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what colour has Tivora?"}]
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
        ours = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert loaded.apply_chat_template(messages, tokenize=False, **options) == ours
        assert loaded(ours)["input_ids"] == tokenizer(ours)["input_ids"]
    assert loaded.padding_side == "left"
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert "extra_special_tokens" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_importing_the_package_imports_no_torch():
    code = "import sys, bruno_ray.organism; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
