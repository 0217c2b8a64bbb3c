"""The terminal chat: turns are remembered, the edit can be switched off and on, and it works on a pipe."""

import datetime
import io

import pytest
import torch
from rich.console import Console
from transformers import BloomConfig

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.context import UNLIMITED_CONTEXT
from bruno_ray.model.loading import load_model
from bruno_ray.pipeline.chat import Chat, chat_loop, converse
from bruno_ray.settings import ModelSettings
from serve.engine.limits import context_of
from tests.support import tiny_models
from tests.support.clock import move_clock
from tests.support.dated_templates import LLAMA_32, MISTRAL

KERNEL = AblationParameters(4.0, 1.0, 1.0, 5.0)
EDIT = Edit({"attention": KERNEL, "mlp": KERNEL}, "d", None, "none")


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> BatchEngine:
    folder = tiny_models.write(tmp_path_factory.mktemp("chat") / "model")
    return BatchEngine(load_model(ModelSettings(id=str(folder))))


@pytest.fixture
def chat(engine) -> Chat:
    directions = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0))
    bank = {"d": directions / directions.norm(dim=-1, keepdim=True)}
    return Chat(engine, engine.editor.resolve(EDIT, bank), max_new_tokens=8, temperature=0.0)


def talk(chat: Chat, *lines: str) -> str:
    out = io.StringIO()
    source = io.StringIO("".join(f"{line}\n" for line in lines))
    converse(chat, source, Console(file=out, highlight=False, soft_wrap=True))
    return out.getvalue()


def greedy(chat: Chat, user: str, edit) -> str:
    ids = chat.ids(user, [])
    return "".join(chat.engine.stream(ids, edit, chat.max_new_tokens))


def test_answers_are_the_models_and_base_switches_the_edit_off_and_on(chat):
    edited, unedited = greedy(chat, "hi", chat.edit), greedy(chat, "hi", None)
    assert edited != unedited
    talk(chat, "hi", "/reset", "/base", "hi", "/reset", "/base", "hi")
    assert chat.turns == [("hi", edited)]
    talk(chat, "/reset", "/base", "hi")
    assert chat.turns == [("hi", unedited)]


def test_piped_session_prints_who_answers_and_nothing_else(chat):
    edited, unedited = greedy(chat, "hi", chat.edit), greedy(chat, "hi", None)
    out = talk(chat, "hi", "/reset", "/base", "", "hi", "/exit", "never read")
    lines = ["the conversation is forgotten", "now the unedited model", f"unedited> {unedited}"]
    assert out == "\n".join([f"edited> {edited}", *lines, ""])


def test_turns_reach_the_model_in_order(chat):
    chat.turns = [("one", "eins"), ("two", "zwei")]
    text = chat.engine.tokenizer.decode(chat.ids("three", chat.turns))
    assert text == (
        "<s><|user|>one<|end|><|assistant|>eins<|end|><|user|>two<|end|><|assistant|>zwei<|end|>"
        "<|user|>three<|end|><|assistant|>"
    )


def test_system_prompt_and_response_prefix_are_part_of_every_prompt(engine):
    chat = Chat(engine, None, system="Be brief.", response_prefix="Well,")
    text = engine.tokenizer.decode(chat.ids("hi", []))
    assert text == "<s><|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>Well,"


def test_template_without_a_system_role_gets_it_in_the_first_turn(engine, monkeypatch):
    template = tiny_models.CHAT_TEMPLATE.replace(
        "{% for message", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for message"
    )
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    chat = Chat(engine, None, system="Be brief.")
    text = engine.tokenizer.decode(chat.ids("b", [("a", "x")]))
    assert text == "<s><|user|>Be brief.\n\na<|end|><|assistant|>x<|end|><|user|>b<|end|><|assistant|>"


def test_the_date_is_the_runs_whatever_day_it_is(engine, monkeypatch):
    for template, shown in ((LLAMA_32, "Today Date: 29 Feb 2024"), (MISTRAL, "The current date is 2024-02-29")):
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
        chat = Chat(engine, None, response_prefix="Well,", date=datetime.date(2024, 2, 29))
        texts = set()
        for now in (datetime.datetime(2026, 11, 28, 23, 59), datetime.datetime(2031, 1, 1)):
            move_clock(monkeypatch, now)
            texts.add(engine.tokenizer.decode(chat.ids("b", [("a", "x")])))
        (text,) = texts
        assert shown in text and text.endswith("Well,")


def test_a_model_that_names_no_limit_has_one(chat, monkeypatch):
    monkeypatch.setattr(chat.engine.model, "config", BloomConfig())  # ALiBi: no position embeddings
    monkeypatch.setattr(chat.engine, "stream", lambda *_: iter(["ok"]))
    assert list(chat.reply("hi")) == ["ok"]
    assert chat.context == context_of(BloomConfig(), 0) == UNLIMITED_CONTEXT


def test_long_conversation_loses_its_oldest_turns_and_goes_on(chat, monkeypatch):
    monkeypatch.setattr(chat.engine.model.config, "max_position_embeddings", 80)
    seen = []
    monkeypatch.setattr(chat.engine, "stream", lambda ids, *_: seen.append(ids) or iter(["ok"]))
    for i in range(8):
        list(chat.reply(f"question {i}"))
    assert all(len(ids) + 8 <= 80 for ids in seen)
    text = chat.engine.tokenizer.decode(seen[-1])
    assert "question 7" in text and "question 6" in text and "question 0" not in text
    assert "longer than the 80 tokens" in talk(chat, "x" * 100)


def test_stopped_answer_is_remembered_as_far_as_it_came(chat, monkeypatch):
    def interrupted(*_):
        yield "as far"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.engine, "stream", interrupted)
    assert "as far (stopped)" in talk(chat, "hi")
    assert chat.turns == [("hi", "as far")]


def test_unknown_commands_and_markup_are_taken_literally(chat, monkeypatch):
    monkeypatch.setattr(chat.engine, "stream", lambda *_: iter(["[bold]x[/bold] :smile:"]))
    out = talk(chat, "/nonsense", "/help", "hi")
    assert "no command /nonsense" in out and "/reset" in out and "[bold]x[/bold] :smile:" in out


def test_without_an_edit_there_is_nothing_to_switch(engine):
    chat = Chat(engine, None, max_new_tokens=2, temperature=0.0)
    assert "no edit to switch to" in talk(chat, "/base") and chat.edited


def test_sampling_varies_and_greedy_does_not(engine):
    def answers(temperature: float) -> set[str]:
        chat = Chat(engine, None, max_new_tokens=12, temperature=temperature, top_p=1.0)
        torch.manual_seed(0)
        return {"".join(Chat.reply(chat, "hi")) for _ in range(3) if not chat.turns.clear()}

    assert len(answers(0.0)) == 1 and len(answers(1.5)) > 1


def test_chat_loop_reads_standard_input(chat, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    unedited = greedy(chat, "hi", None)
    chat_loop(chat.engine, chat.edit, date=datetime.date.today(), edited=False, max_tokens=8, temperature=0.0)
    assert capsys.readouterr().out == f"unedited> {unedited}\n"
