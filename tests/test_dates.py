"""Chat templates that print the date print the one that they are given, whatever day it is."""

import datetime

import pytest

from bruno_ray.prompts.dates import dated, prints_date
from bruno_ray.prompts.rendering import apply_template, render, render_texts
from bruno_ray.prompts.sets import Prompt
from tests.support import tiny_models
from tests.support.clock import move_clock
from tests.support.dated_templates import LLAMA_31, LLAMA_32, MISTRAL

DAY = datetime.date(2024, 2, 29)
PROMPTS = [Prompt("Hello"), Prompt("Hello", "Be kind.")]


@pytest.fixture(params=[datetime.datetime(2026, 11, 28, 23, 59), datetime.datetime(2031, 1, 1)])
def now(request, monkeypatch) -> datetime.datetime:
    """Two days on which every test runs."""
    move_clock(monkeypatch, request.param)
    return request.param


def text_of(template: str, date: datetime.date = DAY) -> str:
    tokenizer = tiny_models.build_tokenizer(template)
    return apply_template(tokenizer, [{"role": "user", "content": "Hello"}], date)


def by_the_clock(template: str) -> str:
    tokenizer = tiny_models.build_tokenizer(template)
    return tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (LLAMA_32, "Today Date: 29 Feb 2024\n"),
        (LLAMA_31, "Today Date: 26 Jul 2024\n"),  # its author's constant stays
        (MISTRAL, "The current date is 2024-02-29."),
    ],
)
def test_prompts_are_the_same_on_two_days(now, template, shown):
    tokenizer = tiny_models.build_tokenizer(template)
    first, second = render_texts(tokenizer, PROMPTS, "Well,", date=DAY)
    assert shown in first and first.endswith("Well,") and "Be kind." in second
    assert tokenizer.decode(render(tokenizer, PROMPTS[:1], "Well,", date=DAY)[0]) == first
    assert str(now.year) not in first + second
    assert prints_date(tokenizer) == (template != LLAMA_31)


@pytest.mark.parametrize("template", [LLAMA_32, LLAMA_31, MISTRAL])
def test_the_text_is_what_the_template_itself_writes_on_that_day(template, monkeypatch):
    move_clock(monkeypatch, datetime.datetime.combine(DAY, datetime.time()))
    tokenizer = tiny_models.build_tokenizer(template)
    conversation = [{"role": "user", "content": " Hello "}, {"role": "assistant", "content": "Hi"}]
    own = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert apply_template(tokenizer, conversation, DAY) == own


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%Y-%m-%d')",
        'strftime_now("%B %d, %Y")',
        "strftime_now( format = '%d/%m/%y' )",
        "strftime_now('%-d %B') ~ strftime_now('%A')",
        "strftime_now('%H:%M on day %j')",
        "strftime_now('100%% of %d, %%d')",
        "strftime_now('%d' + ' of ' + '%m')",
        "strftime_now('%d') | int + 1",
        "(strftime_now is defined) ~ (strftime_now is callable)",
        "strftime_now('no date')",
        "strftime_now('%D')",
    ],
)
def test_every_format_is_what_strftime_makes_of_it(call, monkeypatch):
    template = "\n {{ " + call + " }}{% for m in messages %}{{ m.content }} {{ " + call + " }}{% endfor %}\n"
    move_clock(monkeypatch, datetime.datetime.combine(DAY, datetime.time()))
    expected = by_the_clock(template)
    move_clock(monkeypatch, datetime.datetime(2031, 12, 24, 17, 30))
    assert text_of(template) == expected
    assert (text_of(template, datetime.date(2025, 3, 2)) != expected) == ("%" in call)


def test_the_clock_is_asked_inside_of_macros_and_loops_too(now):
    template = (
        "{% macro day() %}{{ strftime_now('%d.%m.') }}{% endmacro %}"
        "{% for m in messages %}{% set t = strftime_now('%Y') %}{{ day() }}{{ t }} {{ m.content }}{% endfor %}"
    )
    assert text_of(template) == "29.02.2024 Hello"


def test_a_template_without_a_date_is_left_as_it_is():
    assert dated(tiny_models.CHAT_TEMPLATE, DAY) == tiny_models.CHAT_TEMPLATE
    assert not prints_date(tiny_models.build_tokenizer())


def test_what_people_write_is_not_taken_for_a_format(now):
    tokenizer = tiny_models.build_tokenizer(LLAMA_32)
    (text,) = render_texts(tokenizer, [Prompt("What does strftime_now('%d %b %Y') print?")], date=DAY)
    assert "strftime_now('%d %b %Y') print?" in text
