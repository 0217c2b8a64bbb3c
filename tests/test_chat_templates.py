"""Templates that want a message as a list of parts, as multimodal models have them: nothing that was said is lost."""

import datetime

import pytest

from bruno_ray.errors import ModelError
from bruno_ray.prompts.rendering import render_texts
from bruno_ray.prompts.sets import Prompt
from tests.support import tiny_models

TODAY = datetime.date(2026, 1, 2)
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def rendered(template: str, *prompts: Prompt) -> list[str]:
    return render_texts(tiny_models.build_tokenizer(template), prompts, date=TODAY)


def test_the_text_and_the_system_prompt_are_in_the_prompt() -> None:
    assert rendered(LLAVA, Prompt("What is a reef?"), Prompt("Name one.", system="Be brief.")) == [
        "USER: What is a reef? ASSISTANT:",
        "SYSTEM: Be brief. USER: Name one. ASSISTANT:",
    ]
    assert rendered(SMOLVLM, Prompt("What is a reef?")) == [
        "<|im_start|>User: What is a reef?<end_of_utterance>\nAssistant:"
    ]


def test_templates_that_take_strings_are_given_strings() -> None:
    """Also those that would print a list as Python writes it."""
    assert rendered("{{ messages[0]['content'] }}!", Prompt("What is a reef?")) == ["What is a reef?!"]


def test_a_template_that_prints_the_text_in_neither_form_is_refused() -> None:
    with pytest.raises(ModelError, match=r"does not print what the user says \(it gives 'USER:'\)"):
        rendered("{% for message in messages %}USER:{% endfor %}", Prompt("What is a reef?"))
