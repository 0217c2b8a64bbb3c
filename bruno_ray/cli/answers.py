"""`answers`: desired answers to train on."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from bruno_ray.cli import values
from bruno_ray.cli.command import Command
from bruno_ray.cli.setting_flags import run_or_settings, takes_run_or_settings
from bruno_ray.cli.show_config import toml_value
from bruno_ray.errors import SettingsError
from bruno_ray.settings import PromptSet
from bruno_ray.settings.keys import FLAGS
from bruno_ray.terminal import can_ask


def _arguments(parser: argparse.ArgumentParser) -> None:
    takes_run_or_settings(parser)
    parser.add_argument("--number", type=values.count, default=8, metavar="N", help="prompts to ask about [8]")
    parser.add_argument(
        "--from-baseline",
        action="store_true",
        help="ask the model itself, with the baseline prompts that ask the same with another prefix or suffix",
    )
    parser.add_argument(
        "--few-shot",
        action="store_true",
        help="ask the model itself, which is shown the answers that there are as examples",
    )
    parser.add_argument("--to", type=Path, default=Path("answers.jsonl"), metavar="FILE", help="[answers.jsonl]")
    parser.add_argument("--server", metavar="URL", help="another model's server with OpenAI's API, up to its /v1")
    parser.add_argument("--server-model", metavar="NAME", help="the model's name there")
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the server's API key")
    parser.add_argument("--timeout", type=values.positive, default=60.0, metavar="S", help="seconds for an answer [60]")
    parser.epilog = (
        "Four to thirty answers that a model without the behaviour would give are enough to train on (--method"
        " learned). You are shown some train prompts with what the model says now, and type what it should say; with"
        " --server a larger model, which does not show the behaviour, is asked instead. Where both sides ask the same"
        " and only an instruction differs, as in the presets verbosity and hedging, the model's own answers to the"
        " baseline side will do: --from-baseline. --few-shot has the model itself answer more prompts, with up to eight"
        " of the answers that there are before each, and keeps what it is sure of; a training does so by itself where"
        " there are few (learned.few_shot). All train prompts go into the file."
    )


def _answers(arguments: argparse.Namespace) -> None:
    if bool(arguments.server) != bool(arguments.server_model):
        raise SettingsError("command line: --server and --server-model belong together; give both")
    named = [flag for flag, given in zip(SOURCES, map(vars(arguments).get, SOURCES.values())) if given]
    if len(named) > 1:
        raise SettingsError(f"command line: {' and '.join(named)} name {len(named)} to ask; give one")
    if not (named or can_ask()):
        raise SettingsError("command line: there is nobody to ask; run it in a terminal, or name a --server")
    record = run_or_settings(arguments, "answers")
    from bruno_ray.pipeline.answering import Source, collect_answers
    from bruno_ray.scoring.chat_server import ChatServer

    source: Source = "baseline" if arguments.from_baseline else "few-shot" if arguments.few_shot else "person"
    if arguments.server:
        connection = (arguments.server, arguments.server_model, arguments.key_variable, arguments.timeout, CONCURRENCY)
        source = ChatServer("the server", *connection, OPTIONS.__getitem__)
    n = collect_answers(record, arguments.number, arguments.to, source)
    print(f"# {n} of its train prompts have a desired answer")
    print("\n".join(target_with_answers(record.settings.prompts.target, arguments.to.absolute())))


def target_with_answers(target: PromptSet, file: Path) -> Iterator[str]:
    """The whole target side with ``file`` for its train part, as TOML: who gives that part gets no other from a
    preset."""
    given = {"source": str(file), "column": "prompt", "answer_column": "answer"}
    if target.train is not None:
        kept = target.train.model_dump(exclude_defaults=True, include={"system_prompt"})
        given |= ({"category_column": "category"} if target.train.category_column else {}) | kept
    parts = {"train": given}
    for name in ("validation", "test"):
        if (part := getattr(target, name)) is not None:
            parts[name] = part.model_dump(exclude_defaults=True)
    for name, values_of in parts.items():
        yield f"[prompts.target.{name}]"
        yield from (f"{key} = {toml_value(value)}" for key, value in values_of.items())


SOURCES = {"--server": "server", "--from-baseline": "from_baseline", "--few-shot": "few_shot"}
"""Flag -> its name in the namespace; of these one may be given."""

CONCURRENCY = 4
OPTIONS = {
    "url": "--server",
    "model": "--server-model",
    "key_variable": "--key-variable",
    "timeout": "--timeout",
    "concurrency": "--number",
}
"""What the server's settings are called here."""

COMMANDS = {
    "answers": Command(
        "collect desired answers to train prompts, from you, another model or the model itself",
        _answers,
        _arguments,
        FLAGS,
    )
}
