"""Talk to an edited model in the terminal, answers streamed; `/base` switches to the model as it was and back.

Works on a pipe as well: lines in, answers out.
"""

import datetime
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console

from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.model.context import context_length
from bruno_ray.prompts.rendering import apply_template, messages, must_fold
from bruno_ray.prompts.sets import Prompt

HELP = """\
/base    switch between the edited and the unedited model, the conversation stays
/reset   forget the conversation
/exit    leave; so does the end of the input
/help    this text"""

LEAST_ROOM = 0.25
"""Share of the context that is kept free for an answer; older turns are left out for it."""


@dataclass
class Chat:
    """A conversation with one model copy under one edit, or under none."""

    engine: BatchEngine
    edit: ResolvedEdit | None
    system: str | None = None
    response_prefix: str = ""
    """Text every answer starts with, as in the run; it is not shown."""

    date: datetime.date = field(default_factory=datetime.date.today)
    """For chat templates that print one: the run's, or the day the conversation begins."""

    max_new_tokens: int = 1024
    temperature: float = 0.7
    """0 is greedy."""

    top_p: float = 0.95
    edited: bool = True
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(user, answer), oldest first."""

    def __post_init__(self) -> None:
        # A template without a system role has the text folded into the first turn.
        self._fold = must_fold(self.engine.tokenizer, self.system, self.date)

    @property
    def context(self) -> int:
        """Tokens the model can look at."""
        return context_length(self.engine.model.config)

    def ids(self, user: str, turns: list[tuple[str, str]]) -> list[int]:
        """Token ids of the conversation so far and the next question."""
        questions = [question for question, _ in turns] + [user]
        conversation = messages(Prompt(questions[0], self.system), self._fold)
        for (_, answer), question in zip(turns, questions[1:]):
            conversation += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        tokenizer = self.engine.tokenizer
        text = apply_template(tokenizer, conversation, self.date)
        return list(tokenizer(text + self.response_prefix, add_special_tokens=False)["input_ids"])

    def reply(self, user: str) -> Iterator[str]:
        """Pieces of the answer. What was said until then is remembered, also if the caller stops early.

        Raises ValueError if the question alone leaves no room for an answer.
        """
        wanted = min(self.max_new_tokens, int(LEAST_ROOM * self.context))
        turns = self.turns
        while (room := self.context - len(ids := self.ids(user, turns))) < wanted and turns:
            turns = turns[1:]
        if room < 1:
            raise ValueError(f"that is longer than the {self.context} tokens the model can look at")
        said = ""
        try:
            for piece in self.engine.stream(
                ids, self.edit if self.edited else None, min(self.max_new_tokens, room), self.temperature, self.top_p
            ):
                said += piece
                yield piece
        finally:
            self.turns.append((user, said))


def chat_loop(
    engine: BatchEngine,
    edit: ResolvedEdit | None,
    *,
    system_prompt: str | None = None,
    response_prefix: str = "",
    date: datetime.date,
    edited: bool = True,
    max_tokens: int = 1024,
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> None:
    """Talk on standard input and output until `/exit` or the end of the input; see `Chat` for the options."""
    chat = Chat(engine, edit, system_prompt, response_prefix, date, max_tokens, temperature, top_p, edited)
    source = io.StringIO() if sys.stdin is None else sys.stdin  # None: it was closed before we began
    converse(chat, source, Console(highlight=False, soft_wrap=True))


def converse(chat: Chat, source: TextIO, console: Console) -> None:
    """The loop itself. Ctrl-C stops an answer; where none is under way, it leaves as KeyboardInterrupt."""
    at_terminal = source is sys.stdin and source.isatty()
    if at_terminal:
        console.print("[dim]/help lists what else can be typed[/dim]")
    while True:
        line = _read_line(source, console, at_terminal)
        if line is None or line.strip() in ("/exit", "/quit"):
            if at_terminal:
                console.print()
            return
        if line.strip().startswith("/"):
            _command(chat, line.strip(), console)
        elif line.strip():
            _answer(chat, line.strip(), console)


def _read_line(source: TextIO, console: Console, at_terminal: bool) -> str | None:
    """None at the end of the input."""
    if not at_terminal:
        line = source.readline()
        return line.rstrip("\n") if line else None
    try:
        return console.input("[bold]you>[/bold] ")
    except EOFError:
        return None
    except KeyboardInterrupt:
        console.print()
        raise


def _command(chat: Chat, line: str, console: Console) -> None:
    match line.split()[0]:
        case "/base" if chat.edit is None:
            console.print("[dim]this is the unedited model; there is no edit to switch to[/dim]")
        case "/base":
            chat.edited = not chat.edited
            console.print(f"[dim]now the {'edited' if chat.edited else 'unedited'} model[/dim]")
        case "/reset":
            chat.turns.clear()
            console.print("[dim]the conversation is forgotten[/dim]")
        case "/help":
            console.print(HELP, markup=False)
        case other:
            console.print(f"no command {other}; /help lists them", markup=False)


def _answer(chat: Chat, question: str, console: Console) -> None:
    who, color = ("edited", "green") if chat.edited and chat.edit else ("unedited", "yellow")
    console.print(f"[{color}]{who}>[/{color}] ", end="")
    try:
        for piece in chat.reply(question):
            console.print(piece, end="", markup=False, emoji=False)
            console.file.flush()
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except ValueError as error:
        console.print(str(error), end="", markup=False)
    console.print()
