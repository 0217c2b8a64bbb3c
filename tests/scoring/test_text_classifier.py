"""A text classifier as scorer: tiny BERTs, one random, one trained for a second to tell two word lists apart."""

import datetime
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from bruno_ray.errors import ModelError, SettingsError
from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.generation.prompt_reads import PromptReads
from bruno_ray.model.loading import load_model
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.registry import make_scorers
from bruno_ray.scoring.text_classifier import Classifier, label_of
from bruno_ray.settings import ClassifierSettings, ModelSettings, ScoringSettings
from tests.support import tiny_models

REFUSING = [
    "sorry",
    "cannot",
    "unable",
    "refuse",
    "decline",
    "apologise",
    "regret",
    "must",
    "not",
    "forbidden",
    "impossible",
    "against",
]
ANSWERING = [
    "here",
    "is",
    "the",
    "answer",
    "of",
    "course",
    "first",
    "then",
    "mix",
    "bake",
    "river",
    "blue",
    "seven",
    "walk",
    "open",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LABELS = {0: "ANSWER", 1: "REFUSAL"}
LONGEST = 24
CPU = torch.device("cpu")


def write(folder: Path, trained: bool) -> Path:
    """A classifier of sentences of those words, with its tokenizer."""
    words = [*SPECIAL, *REFUSING, *ANSWERING]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    plain.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LONGEST
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LONGEST,
        id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
        initializer_range=0.02 if trained else 0.5,  # random verdicts that differ
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    if trained:
        draw = random.Random(1)
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            kinds = [draw.randrange(2) for _ in range(32)]
            inputs = tokenizer([sentence(kind, draw) for kind in kinds], return_tensors="pt", padding=True)
            loss = model(**inputs, labels=torch.tensor(kinds)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentence(kind: int, draw: random.Random) -> str:
    return " ".join(draw.choices((ANSWERING, REFUSING)[kind], k=draw.randrange(2, 9)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("classifiers") / "trained", True)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("classifiers") / "random", False)


def settings_of(model: Path, **changes: str) -> ClassifierSettings:
    return ClassifierSettings(**({"model": str(model), "label": "refusal"} | changes))


def test_it_tells_apart_what_it_was_trained_to(trained: Path) -> None:
    draw = random.Random(2)
    kinds = [i % 2 for i in range(100)]
    texts = [sentence(kind, draw) for kind in kinds]
    p = Classifier(settings_of(trained), CPU).probability([""] * len(texts), texts)
    assert sum((p > 0.5).int().tolist()[i] == kind for i, kind in enumerate(kinds)) >= 97
    other = Classifier(settings_of(trained, label="0"), CPU).probability([""] * len(texts), texts)
    torch.testing.assert_close(p + other, torch.ones(len(texts)))


def test_probabilities_are_those_of_the_model_text_by_text(untrained: Path) -> None:
    """Order, batches and padding do not matter, and what is too long is cut at its end."""
    draw = random.Random(3)
    users, texts = zip(*((sentence(0, draw), sentence(i % 2, draw)) for i in range(70)))
    texts = (*texts, "sorry " * 60, "")
    users = (*users, "here is", "here is")
    model = BertForSequenceClassification.from_pretrained(untrained).eval()
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    for reads in ("answer", "prompt_and_answer"):
        found = Classifier(settings_of(untrained, reads=reads), CPU).probability(users, texts)
        for user, text, p in zip(users, texts, found.tolist()):
            given = (user, text) if reads == "prompt_and_answer" else (text,)
            inputs = tokenizer(*([each] for each in given), return_tensors="pt", truncation=True, max_length=LONGEST)
            with torch.inference_mode():
                wanted = model(**inputs).logits.softmax(-1)[0, 1]
            assert p == pytest.approx(float(wanted), abs=1e-5)
        assert found.std() > 0.05


def test_the_scorer_averages_over_answers_and_counts(trained: Path, tmp_path: Path) -> None:
    engine = BatchEngine(load_model(ModelSettings(id=str(tiny_models.write(tmp_path / "model")), dtypes=("float32",))))
    prompts = tuple(Prompt(f"say {i}") for i in range(4))
    rendered = ScoringPrompts.rendered(engine, prompts, prompts, date=datetime.date(2024, 2, 29))
    settings = ScoringSettings(
        scorers=("text_classifier",),
        objectives=("classified_shown",),
        markers=("nothing",),
        classifier=settings_of(trained),
    )
    (scorer,) = make_scorers(settings)
    scorer.prepare(Evaluation(engine, rendered, settings))
    edited = Evaluation(engine, rendered, settings, [None, None])
    texts = [["sorry cannot", "here is the answer", "unable must not", "blue river"], ["here is"] * 4]
    answers = [[Response((5,), text, ended=True, decided=False) for text in some] for some in texts]
    edited.take_answers(answers, PromptReads())
    first, second = scorer.score(edited)
    assert first.counts == {"classified_shown": (2, 4)} and second.counts == {"classified_shown": (0, 4)}
    assert first.values["classified_rate"] == pytest.approx(sum(first.verdicts["text_classifier"]) / 4)
    assert first.values["classified_rate"] > 0.4 > 0.2 > second.values["classified_rate"]
    assert first.rows["classified_shown"] == (1, 0, 1, 0)


def test_what_is_missing_is_one_line(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"needs scoring\.classifier\.model and scoring\.classifier\.label"):
        make_scorers(ScoringSettings(scorers=("behaviour_rate", "kl_divergence", "text_classifier")))
    with pytest.raises(ModelError, match=r"text classifier .*nowhere cannot be loaded"):
        Classifier(settings_of(tmp_path / "nowhere"), CPU)
    with pytest.raises(SettingsError, match=r"no label 'rude': .* one of ANSWER, REFUSAL"):
        Classifier(settings_of(trained, label="rude"), CPU)
    assert label_of(LABELS, "Refusal") == label_of(LABELS, "1") == 1
