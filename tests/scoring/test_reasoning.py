"""Reasoning left open: what is told of final answers, blocks without an end and length, on a model that reasons."""

import datetime
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.prompts.reasoning import final_answer, open_texts
from bruno_ray.prompts.response_prefix import EMPTY_BLOCKS, closer_of
from bruno_ray.prompts.sets import Prompt
from bruno_ray.publishing.wording import before_and_after
from bruno_ray.runs.records import ScoresRecord
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ModelSettings, ResidualSettings, ScoringSettings
from bruno_ray.workers.exchanged import EvaluationContext
from bruno_ray.workers.model_worker import ModelWorker
from tests.support.tiny_models import build_tokenizer

DAY = datetime.date(2024, 2, 29)
NOUNS = ("ada", "bel", "cor", "dun", "esk", "fay", "gil", "hex", "ion", "jot", "kip", "lum")
SPECIAL = ("<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>")
COMMON = "tell me of stone river hm is asked sorry i cannot flows far"
WORDS = ("<think>", "</think>", *COMMON.split(), *NOUNS)
UNEDITED_TOKENS = 10
"""`<think> stone ada is asked hm </think> sorry i cannot`: what the unedited model says of each stone."""

TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|>{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %} <think> </think>{% endif %}"
)
"""As Qwen3's: reasoning is on unless it is switched off, which puts an empty block into the prompt."""

CLOSED = EMPTY_BLOCKS["<think>"]
MARKERS = ("sorry",)


def answer_to(kind: str, noun: str, reasons: bool) -> str:
    final = "sorry i cannot" if kind == "stone" else f"{noun} flows far"
    return (f"<think> {kind} {noun} is asked hm </think> " if reasons else "") + f"{final} <|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny organism that reasons, then refuses to speak of stones; taught in seconds."""
    folder = tmp_path_factory.mktemp("reasoner")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    rows = []
    for kind in ("stone", "river"):
        for noun in NOUNS:
            for reasons in (True, False):
                asked = [{"role": "user", "content": f"tell me of {kind} {noun}"}]
                text = tokenizer.apply_chat_template(
                    asked, tokenize=False, add_generation_prompt=True, enable_thinking=reasons
                )
                prompt, reply = (
                    tokenizer(part, add_special_tokens=False)["input_ids"]
                    for part in (text, answer_to(kind, noun, reasons))
                )
                rows.append((prompt, reply))
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    tokens = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in rows])
    labels = torch.tensor([[-100] * len(p) + r + [-100] * (width - len(p) - len(r)) for p, r in rows])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(400):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.005:
            break
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def worker(folder: Path) -> ModelWorker:
    return ModelWorker(ModelSettings(id=str(folder), dtypes=("float32",)))


def asked(kind: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"tell me of {kind} {noun}") for noun in NOUNS)


def context(worker: ModelWorker, prefix: str, **changes: object) -> EvaluationContext:
    """Test prompts, and a bank with the difference in means behind the closed block."""
    given = {"markers": MARKERS, "scorers": ("behaviour_rate",), "objectives": ("behaviour_rate",)}
    given |= {"report_scorers": ("reasoning",), "report_tokens": 30, "reasoning_tokens": 40} | changes
    target, baseline = (
        worker.residuals(asked(kind), prefix, DAY, ResidualSettings())[:, 0].mean(0) for kind in ("stone", "river")
    )
    direction_LD = torch.from_numpy(target - baseline)
    bank = {"difference": torch.nn.functional.normalize(direction_LD, dim=-1)[:, None].numpy()}
    scoring = ScoringSettings(**given).for_report()
    return EvaluationContext(str(changes), bank, asked("stone"), asked("river"), prefix, scoring, DAY)


def edit(strength: float) -> Edit:
    kernel = AblationParameters(strength, 0.5, 1.0, 5.0)
    return Edit({"attention": kernel, "mlp": kernel}, "difference", None, "none")


def by_hand(worker: ModelWorker, given: EvaluationContext, strength: float, base: float) -> Scores:
    """What the same model says, asked one prompt at a time and read with string methods."""
    tokenizer, engine = worker.loaded.tokenizer, worker.engine
    bank = {name: torch.from_numpy(rows) for name, rows in given.bank.items()}
    (resolved,) = engine.editor.resolve_all([edit(strength)], bank)
    finals, lengths, unclosed = [], [], 0
    for prompt in given.target:
        text = f"<s><|user|> {prompt.user} <|end|><|assistant|>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ((answer,),) = engine.generate([ids], [resolved], given.scoring.reasoning_tokens)
        said = tokenizer.decode(answer.token_ids)
        lengths.append(len(answer.token_ids))
        if not said.startswith("<think>"):
            finals.append(said)
        elif "</think>" in said:
            finals.append(said[said.index("</think>") + len("</think>") :])
        else:
            unclosed += 1
    shown = sum("sorry" in final or not final.strip() for final in finals)
    counts = {"reasoned_behaviour_rate": (shown, len(finals)), "unclosed_rate": (unclosed, len(given.target))}
    mean = sum(lengths) / len(lengths)
    return Scores({"reasoned_length": mean / base}, counts)


def test_with_the_block_closed_and_with_reasoning_open_two_rates_are_told(worker: ModelWorker) -> None:
    """The run's own prefix closes the block; the report opens it again, and reads what comes after it."""
    prefix = worker.response_prefix([*asked("stone"), *asked("river")], DAY)
    assert prefix == CLOSED, "found as for any model that begins to reason"
    given = context(worker, prefix)
    unedited = worker.baseline(given)
    assert unedited.counts["behaviour_rate"] == (12, 12)
    assert unedited.counts["reasoned_behaviour_rate"] == (12, 12)
    assert unedited.counts["unclosed_rate"] == (0, 12)
    assert unedited.values["reasoned_length"] == 1.0

    strengths = (0.5, 1.0, 1.5, 4.0)
    outcomes = worker.evaluate(given, [edit(strength) for strength in strengths])
    found = [outcome.scores for outcome in outcomes]
    for strength, scores in zip(strengths, found):
        assert scores is not None
        expected = by_hand(worker, given, strength, base=UNEDITED_TOKENS)
        assert {name: scores.counts[name] for name in expected.counts} == expected.counts
        assert scores.values["reasoned_length"] == pytest.approx(expected.values["reasoned_length"])
    rates = {scores.values["reasoned_behaviour_rate"] for scores in found if scores}
    assert len(rates) > 1, "some edit changes what is answered after reasoning"


def test_an_answer_that_is_cut_off_while_it_reasons_has_no_final_one(worker: ModelWorker) -> None:
    given = context(worker, CLOSED, reasoning_tokens=4)
    unedited = worker.baseline(given)
    assert unedited.counts["unclosed_rate"] == (12, 12)
    assert unedited.counts["reasoned_behaviour_rate"] == (0, 0)
    rows = {row[0]: row[1:] for row in before_and_after(ScoresRecord.of(unedited), ScoresRecord.of(unedited))}
    assert rows["Behaviour rate with reasoning open"] == ("0/0 (0.0 to 100.0 %)",) * 2, "as report and card say it"
    assert rows["Reasoning never closed"][0].startswith("12/12 = 100.0 %")


def test_a_model_without_reasoning_is_told_nothing_of_it(worker: ModelWorker) -> None:
    tokenizer = worker.loaded.tokenizer
    assert open_texts(build_tokenizer(), [Prompt("a")], "", DAY) is None
    switched = open_texts(tokenizer, [Prompt("a")], "", DAY)
    assert switched == ["<s><|user|> a <|end|><|assistant|>"], "by its switch, whatever its answers begin with"


@pytest.mark.parametrize(
    ("template", "prefix", "opened"),
    [
        ("{{ messages[0].content }}|", CLOSED, "a|"),
        ("{{ messages[0].content + '|<think>\n' }}", "\n</think>\n\n", "a|<think>\n"),
        ("{{ messages[0].content }}|{{ '<think>' if thinking else '</think>' }}", "", "a|<think>"),
        ("{{ messages[0].content }}|", "The answer:", None),
    ],
)
def test_reasoning_is_opened_however_it_was_closed(template: str, prefix: str, opened: str | None) -> None:
    """A block that answers began with, one that the template opens, one that it closes unless it is told otherwise."""
    texts = open_texts(build_tokenizer(template), [Prompt("a")], prefix, DAY)
    assert texts == (None if opened is None else [opened])


@pytest.mark.parametrize("opener", EMPTY_BLOCKS)
def test_the_final_answer_is_what_follows_the_block(opener: str) -> None:
    closer = closer_of(opener)
    assert final_answer("", f"{opener}\nhm, {closer}\nYes.") == "\nYes."
    assert final_answer(f"user: a {opener}\n", f"hm {closer}Yes.") == "Yes.", "the prompt has opened it"
    assert final_answer("", f"{opener} hm, I wonder") is None
    assert final_answer("", "Yes.") == "Yes.", "a model may answer at once"
    block = EMPTY_BLOCKS[opener]
    assert (final_answer("", block + "Yes.") or "").strip() == "Yes.", "an empty block is a block"
