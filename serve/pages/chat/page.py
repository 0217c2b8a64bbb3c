"""The chat page: one prompt, two models, their answers side by side."""

import html
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from serve.pages.chat.answers import RunningStreams, Sampling, answer
from serve.pages.chat.client import Api, ApiError
from serve.pages.chat.conversation import Turn, bubbles, caption, finished, new_turn
from serve.pages.chat.models import Front, Models, stats_line
from serve.pages.study import page_of

HERE = Path(__file__).parent
STATS_SECONDS = 2.0
# Browser storage is encrypted with this; it keeps nothing from anyone who can read this file, and must stay the same
# for histories to survive a restart of the server.
STORAGE_SECRET = "bruno-ray"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Side:
    """One of the two conversations and the components that show it."""

    name: str
    picker: gr.Dropdown
    chat: gr.Chatbot
    caption: gr.HTML
    turns: gr.BrowserState

    @classmethod
    def build(cls, name: str) -> "Side":
        with gr.Column(min_width=320, elem_id=f"side-{name}"):
            picker = gr.Dropdown(
                [], label=f"Model {name}", allow_custom_value=True, elem_id=f"model-{name}", interactive=True
            )
            chat = gr.Chatbot(
                show_label=False,
                height="52vh",
                min_height=260,
                buttons=["copy"],
                feedback_options=None,
                layout="bubble",
                placeholder="No answers yet",
                elem_id=f"chat-{name}",
                elem_classes="answers",
            )
            line = gr.HTML(elem_classes="caption", elem_id=f"caption-{name}", padding=False)
        turns = gr.BrowserState([], storage_key=f"bruno-ray-turns-{name}", secret=STORAGE_SECRET)
        return cls(name, picker, chat, line, turns)

    @property
    def shown(self) -> list[gr.components.Component]:
        return [self.chat, self.caption, self.turns]


def draw(turns: list[Turn]) -> tuple[list[dict[str, str]], str]:
    return bubbles(turns), _escaped(caption(turns))


def _escaped(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


class Page:
    """Builds the Blocks and holds its callbacks."""

    def __init__(self, api: Api, auth_required: bool):
        self.api = api
        self.auth_required = auth_required
        self.streams = RunningStreams()
        self.blocks = self._build()

    # ------------------------------------------------------------------------------------------------- layout

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="bruno-ray", analytics_enabled=False, fill_width=True) as blocks:
            with gr.Row(elem_id="top"):
                gr.HTML("<h1>bruno-ray</h1>", elem_id="title", padding=False)
                self.stats = gr.HTML(elem_id="stats", elem_classes="caption", padding=False)
            self.key = gr.Textbox(
                label="Key",
                type="password",
                visible=self.auth_required,
                elem_id="key",
                info="Enter to connect. Kept for this tab only.",
            )
            self.problem = gr.HTML(elem_id="problem", padding=False)
            with gr.Row():
                self.left, self.right = Side.build("left"), Side.build("right")
            with gr.Row(elem_id="asking"):
                self.prompt = gr.Textbox(
                    show_label=False,
                    placeholder="Ask both models; Enter sends",
                    lines=1,
                    max_lines=12,
                    scale=8,
                    autofocus=True,
                    elem_id="prompt",
                )
                self.send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
                self.stop = gr.Button("Stop", scale=1, min_width=90, elem_id="stop")
            with gr.Row(elem_id="tools"):
                self.again = gr.Button("Ask again", size="sm", min_width=90, elem_id="again")
                self.export = gr.Button("Export", size="sm", min_width=90, elem_id="export")
                self.clear = gr.Button("Clear", size="sm", min_width=90, elem_id="clear")
            with gr.Accordion("System prompt and sampling", open=False):
                self.system = gr.Textbox(
                    label="System prompt", info="Empty: that of the run", lines=2, max_lines=8, elem_id="system"
                )
                with gr.Row():
                    self.temperature = gr.Slider(
                        0, 2, 0.7, step=0.05, label="Temperature", info="0 is greedy", elem_id="temperature"
                    )
                    self.top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p", info="1 is off")
                    self.max_tokens = gr.Number(
                        512, label="Max tokens", precision=0, minimum=1, elem_id="max-tokens", info="Of one answer"
                    )
                    self.seed = gr.Textbox(label="Seed", info="Empty: a new one each time", elem_id="seed")
            with gr.Accordion("Pareto front", open=True, elem_id="front-section"):
                with gr.Row():
                    self.run = gr.Dropdown([], label="Run", elem_id="run", scale=3, interactive=True)
                    self.study = gr.HTML(elem_id="study-link", min_width=200)
                    self.refresh = gr.Button("Refresh", size="sm", min_width=90, elem_id="refresh")
                self.front = gr.Dataframe(
                    type="array", interactive=False, show_label=False, wrap=True, elem_id="front", buttons=[]
                )
                gr.HTML("A click on a row loads that trial on the right.", elem_classes="caption", padding=False)
            self.markers = gr.JSON(visible="hidden", elem_id="markers")
            self.choices = gr.BrowserState({}, storage_key="bruno-ray-choices", secret=STORAGE_SECRET)
            self._wire(blocks)
        return blocks

    @property
    def _sampling(self) -> list[gr.components.Component]:
        return [self.system, self.temperature, self.top_p, self.max_tokens, self.seed]

    @property
    def _chosen(self) -> list[gr.components.Component]:
        """What is remembered beside the conversations, in the order of `page.js`' names."""
        return [self.left.picker, self.right.picker, *self._sampling]

    def _wire(self, blocks: gr.Blocks) -> None:
        known = {
            "inputs": [self.key, self.choices, self.left.picker, self.right.picker, self.run],
            "outputs": [self.left.picker, self.right.picker, self.run, self.markers, self.problem],
        }
        front = {"inputs": [self.key, self.run], "outputs": [self.front, self.study]}
        remembered = (
            [self.left.turns, self.right.turns, self.choices],
            [*self.left.shown, *self.right.shown, *self._sampling],
        )
        # The key is read from, and kept in, the tab's session storage: it is never part of what the server stores.
        loaded = (
            blocks.load(None, self.key, self.key, js="bruno.key", **QUIET)
            .then(self._restore, *remembered, **QUIET)
            .then(self._connect, **known, **QUIET)
        )
        entered = self.key.submit(None, self.key, js="bruno.keepKey", **QUIET)
        connected = entered.then(self._connect, **known, **QUIET)
        for step in (loaded, connected):
            step.then(None, self.markers, js="bruno.mark", **QUIET)
        self.run.change(self._show_front, **front, **QUIET)
        self.refresh.click(self._connect, **known, **QUIET).then(self._show_front, **front, **QUIET)
        self.front.select(self._load_trial, self.front, self.right.picker, **QUIET).then(
            None, self._chosen, self.choices, js="bruno.choices", **QUIET
        )
        gr.on(
            [c.blur if isinstance(c, gr.Textbox) else c.input for c in self._chosen],
            None,
            self._chosen,
            self.choices,
            js="bruno.choices",
            **QUIET,
        )

        asking = [*self.left.shown, *self.right.shown]
        models_and_turns = [self.left.picker, self.right.picker, self.left.turns, self.right.turns]
        asked = gr.on(
            [self.prompt.submit, self.send.click],
            self._ask,
            [self.prompt, *models_and_turns],
            [self.prompt, *asking],
            **QUIET,
        )
        asked_again = self.again.click(self._ask_again, models_and_turns, [self.prompt, *asking], **QUIET)
        for started in (asked, asked_again):
            for side in (self.left, self.right):
                started.success(self._answer, [self.key, side.turns, *self._sampling], side.shown, **QUIET)
        self.stop.click(self._stop, None, None, **QUIET)
        blocks.unload(self._stop)
        self.clear.click(self._clear, None, asking, **QUIET)
        for side in (self.left, self.right):
            side.chat.clear(lambda: ("", []), None, [side.caption, side.turns], **QUIET)
        self.export.click(
            None, [self.left.turns, self.right.turns, *self._sampling], js="bruno.exportConversations", **QUIET
        )
        gr.Timer(STATS_SECONDS).tick(self._stats, self.key, self.stats, **QUIET)

    # ---------------------------------------------------------------------------------------------- callbacks

    async def _restore(self, left: list[Turn], right: list[Turn], choices: dict[str, Any]) -> list[Any]:
        sides = []
        for turns in map(finished, (left, right)):
            sides += [*draw(turns), turns]
        names = ("system", "temperature", "top_p", "max_tokens", "seed")
        return [*sides, *(choices.get(name, gr.skip()) for name in names)]

    async def _connect(
        self,
        key: str,
        choices: dict[str, Any],
        left_model: str | None,
        right_model: str | None,
        run: str | None,
    ) -> list[Any]:
        try:
            models = await Models.fetch(self.api, key)
        except ApiError as error:
            unchanged = [gr.skip() for _ in range(4)]
            asking_for_it = self.auth_required and not key
            return [*unchanged, "Enter the server's key to begin." if asking_for_it else _escaped(str(error))]
        left = models.default(left_model or choices.get("left"), "base", "saved")
        right = models.default(right_model or choices.get("right"), "run", "trial", "saved")
        return [
            gr.update(choices=models.choices, value=left),
            gr.update(choices=models.choices, value=right),
            gr.update(choices=models.runs, value=run if run in models.runs else next(iter(models.runs), None)),
            models.markers,
            _escaped("\n".join(f"Not served: {problem}" for problem in models.problems)),
        ]

    async def _show_front(self, key: str, run: str | None) -> list[Any]:
        if not run:
            return [gr.update(value=None), ""]
        link = f'<a href="../study/{page_of(run)}/" target="_blank" rel="noopener">All trials of this study</a>'
        try:
            front = await Front.fetch(self.api, key, run)
        except ApiError as error:
            return [gr.update(value=None), _escaped(str(error))]
        return [gr.update(value={"headers": front.headers, "data": front.rows}), link]

    def _load_trial(self, table: list[list[Any]], event: gr.SelectData) -> str:
        row = event.row_value or table[event.index[0]]
        return str(row[-1])

    async def _ask(
        self, prompt: str, left_model: str, right_model: str, left: list[Turn], right: list[Turn], request: gr.Request
    ) -> list[Any]:
        if self.streams.any(request.session_hash or ""):
            raise gr.Error("Answers are still being written: stop them first.", print_exception=False)
        if not prompt.strip():
            raise gr.Error("Write a prompt first.", print_exception=False)
        sides = []
        for model, turns in ((left_model, left), (right_model, right)):
            turns = [*finished(turns), new_turn(prompt, model or "")]
            sides += [*draw(turns), turns]
        return ["", *sides]

    async def _ask_again(
        self, left_model: str, right_model: str, left: list[Turn], right: list[Turn], request: gr.Request
    ) -> list[Any]:
        """The last prompt once more, to the models that are chosen now, in place of its answers."""
        if not (asked := left or right):
            raise gr.Error("There is no prompt to ask again.", print_exception=False)
        question = asked[-1]["user"]
        return await self._ask(question, left_model, right_model, left[:-1], right[:-1], request)

    async def _answer(
        self,
        key: str,
        turns: list[Turn],
        system: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: str,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        session = request.session_hash or ""
        try:
            chosen_seed = int(seed) if (seed or "").strip() else None
            sampling = Sampling(system or "", temperature, top_p, int(max_tokens), chosen_seed)
        except (TypeError, ValueError):
            turns = [*turns[:-1], {**turns[-1], "error": "max tokens and seed must be whole numbers"}]
            yield *draw(turns), turns
            return
        async for now in answer(self.api, self.streams, session, key, turns, sampling):
            ended = now[-1]["finish"] or now[-1]["error"]
            yield *draw(now), (now if ended else gr.skip())

    async def _stop(self, request: gr.Request) -> None:
        self.streams.stop(request.session_hash or "")

    async def _clear(self, request: gr.Request) -> list[Any]:
        self.streams.stop(request.session_hash or "")
        return [*draw([]), [], *draw([]), []]

    async def _stats(self, key: str) -> str:
        return _escaped(await stats_line(self.api, key)) if key or not self.auth_required else ""
