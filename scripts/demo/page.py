"""The demo's page: pictures of the tokens, and the rows' answers side by side. It asks no other host for anything."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.demo.sessions import Session, SharedModel
from scripts.demo.show import as_figures, as_messages, describe_tokens, open_upload
from vzip import UserError
from vzip.overlay import attention_map, kept_tokens, merged_tokens

SIDE = 480
REDRAWN = 0.1
"""Seconds between two drawings of an answer that grows: the page's work slows the model's."""
PROJECTORS = {"full": "base projector", "free": "base projector", "tuned": "tuned projector"}
DRAWINGS = {
    "**Kept**: dominant orange, merge targets blue": kept_tokens,
    "**Merged**: one colour and number, one token": merged_tokens,
    "**Attention**: violet little, yellow most": attention_map,
}
NO_PICTURE = "Upload a picture, or choose one, to see its tokens."
STYLE = """
.gradio-container > main, .gradio-container { max-width: 1280px; width: 100%; margin: 0 auto; }
.message:not(:empty) p { border-left: 4px solid #d55e00; padding: .25rem .75rem; }
.drawing img { image-rendering: pixelated; }
.drawing:not(:hover) .icon-button-wrapper { opacity: 0; }
#examples .grid-wrap { height: auto; min-height: 0; padding-top: 2rem; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; grid-auto-rows: auto !important; }
#examples .grid-container { height: auto; }
#examples .grid-container button { aspect-ratio: 1; height: auto; }
.answers button[aria-label="Clear"] { display: none; }
.figures table { font-size: .85em; width: 100%; }
.figures th, .figures td { padding: .15rem .4rem !important; white-space: nowrap; border-color: #8884 !important; }
"""


class NoOtherHosts:
    """Tells browsers to load nothing for the page from anywhere but here."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [*message["headers"], (b"content-security-policy", self.POLICY)],
                }
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class ExamplePicture:
    """A held-out picture with a question about it."""

    picture: Image.Image
    question: str


class Page:
    """The page's parts, and what happens when they are touched.

    Args:
        rows: which answer.
        title: what they are of, as Markdown.
        examples: offered beside the upload.
    """

    def __init__(self, rows: SharedModel, *, title: str, examples: Sequence[ExamplePicture]) -> None:
        self.rows, self.examples = rows, examples
        with gr.Blocks(title="vzip", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            self.conversation = gr.State(None, time_to_live=3600)
            gr.Markdown(f"# Which visual tokens stay, and what is answered\n{title}")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._build_input()
                with gr.Column(scale=3, min_width=280):
                    self._build_drawings()
            self.question = gr.Textbox(
                label="Question",
                placeholder="Ask about the picture, in as many turns as you like",
                submit_btn="Ask",
                elem_id="question",
            )
            self.hint = gr.Markdown(elem_id="hint", elem_classes="message")
            with gr.Row():
                self._build_answers()
            gr.Markdown(
                "*Prompt run*: how many tokens of the conversation a turn ran; the others were in its KV cache. The rows "
                "answer greedily, one after the other, so that each is timed alone."
            )
            self.again = gr.Button("New conversation", size="sm", elem_id="again")
            self._connect()

    def _build_input(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            sources=["upload", "clipboard"],
            type="filepath",
            height=240,
            buttons=[],
            elem_id="picture",
        )
        self.message = gr.Markdown(elem_id="message", elem_classes="message")
        self.gallery = gr.Gallery(
            [each.picture for each in self.examples],
            label="Held-out pictures",
            columns=4,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            visible=bool(self.examples),
            buttons=[],
            elem_id="examples",
        )

    def _build_drawings(self) -> None:
        self.drawings = []
        with gr.Row():
            for title in DRAWINGS:
                with gr.Column(min_width=220):
                    gr.Markdown(title)
                    drawing = gr.Image(
                        format="png",
                        interactive=False,
                        show_label=False,
                        alt_text=title.replace("*", ""),
                        buttons=["fullscreen"],
                        elem_classes="drawing",
                    )
                    self.drawings.append(drawing)
        self.summary = gr.Markdown(NO_PICTURE, elem_id="summary")
        budgets, family = self.rows.budgets, self.rows.comparison.family
        one = "a tile" if len(family.image_sizes) > 1 else "a picture"
        self.budget = gr.Slider(
            budgets[0],
            budgets[-1],
            value=self.rows.budget,
            step=family.budget_tiles,
            label="Budget: visual tokens of "
            + (f"{family.budget_tiles} tiles" if family.budget_tiles > 1 else one),
            info="Another budget is another conversation.",
            visible=len(budgets) > 1,
            buttons=[],
            elem_id="budget",
        )

    def _build_answers(self) -> None:
        self.titles, self.answers, self.figures = {}, {}, {}
        for name in self.rows.names:
            with gr.Column(min_width=280):
                self.titles[name] = gr.Markdown(self._title(name, None), elem_id=f"title-{name}")
                self.answers[name] = gr.Chatbot(
                    show_label=False,
                    height=280,
                    render_markdown=False,
                    buttons=[],
                    feedback_options=None,
                    elem_classes="answers",
                    elem_id=f"answers-{name}",
                )
                self.figures[name] = gr.Markdown(elem_id=f"figures-{name}", elem_classes="figures")

    def _title(self, name: str, conversation: Session | None) -> str:
        """What stands above a row's answers."""
        if conversation is None:
            return f"**{name}**: {PROJECTORS[name]}"
        if reason := conversation.closed(name):
            return f"**{name}**: {reason}"
        return f"**{name}**: {conversation.num_visual_tokens(name):,} visual tokens, {PROJECTORS[name]}"

    @property
    def shown(self) -> list[Any]:
        """The parts that a picture, a budget or a question changes."""
        rows = [*self.titles.values(), *self.answers.values(), *self.figures.values()]
        said = [self.message, self.hint, self.summary, self.question]
        return [self.conversation, self.picture, *said, *self.drawings, *rows]

    def _connect(self) -> None:
        one_at_a_time = {
            "outputs": self.shown,
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "minimal",
        }
        raw = {**one_at_a_time, "preprocess": False}  # Gradio would open whatever PIL knows
        self.picture.upload(self.choose, [self.picture, self.budget], **raw)
        self.picture.clear(self.clear, None, **one_at_a_time)
        self.gallery.select(self.pick, [self.budget], **one_at_a_time)
        changed = {**one_at_a_time, "trigger_mode": "always_last"}
        self.budget.change(self.rebudget, [self.conversation, self.budget], **changed)
        self.again.click(self.restart, [self.conversation], **one_at_a_time)
        self.question.submit(self.ask, [self.conversation, self.question], **one_at_a_time)

    def _begun(self, picture: Image.Image, wanted: float) -> dict[Any, Any]:
        """A new conversation, and what is seen of its picture."""
        budget = self.rows.nearest(wanted)
        seen = self.rows.look(picture, budget)
        conversation = Session(self.rows, picture, budget)
        drawn = [draw(seen.tile, side=SIDE) for draw in DRAWINGS.values()]
        return {
            self.message: "",
            self.summary: describe_tokens(seen),
            **dict(zip(self.drawings, drawn, strict=True)),
            **self._turns(conversation),
        }

    def _turns(self, conversation: Session | None) -> dict[Any, Any]:
        shown: dict[Any, Any] = {self.conversation: conversation, self.hint: ""}
        for name in self.rows.names:
            turns = conversation.turns[name] if conversation else []
            shown[self.titles[name]] = self._title(name, conversation)
            shown[self.answers[name]] = as_messages(turns)
            shown[self.figures[name]] = as_figures(turns)
        return shown

    def choose(self, file: dict[str, Any], budget: float) -> dict[Any, Any]:
        """A file was uploaded."""
        try:
            picture = open_upload(file["path"])
        except UserError as error:
            return {**self.clear(), self.message: str(error)}
        return self._begun(picture, budget)

    def pick(self, budget: float, event: gr.SelectData) -> dict[Any, Any]:
        """One of the examples was chosen."""
        example = self.examples[event.index]
        return {
            **self._begun(example.picture, budget),
            self.picture: example.picture,
            self.question: example.question,
        }

    def clear(self) -> dict[Any, Any]:
        """The picture was taken away."""
        empty: dict[Any, Any] = dict.fromkeys([self.picture, *self.drawings])
        return {self.message: "", self.summary: NO_PICTURE, **empty, **self._turns(None)}

    def rebudget(self, conversation: Session | None, budget: float) -> dict[Any, Any]:
        """The budget is another one: other tokens, and so another conversation."""
        return self._begun(conversation.picture, budget) if conversation else {self.message: ""}

    def restart(self, conversation: Session | None) -> dict[Any, Any]:
        """Forget the turns."""
        return self._turns(conversation.restart() if conversation else None)

    def ask(self, conversation: Session | None, question: str) -> Iterator[dict[Any, Any]]:
        """Ask all rows, one after the other, so that each is timed alone."""
        if conversation is None or not question.strip():
            yield {
                self.hint: "Type a question."
                if conversation
                else "Choose a picture first, then ask about it."
            }
            return
        yield {self.hint: "", self.question: ""}
        for name in conversation.open_rows:
            turns, drawn = conversation.turns[name], 0.0
            for _ in conversation.ask(name, question.strip()):
                if time.monotonic() - drawn > REDRAWN:
                    yield {self.answers[name]: as_messages(turns)}
                    drawn = time.monotonic()
            yield {self.answers[name]: as_messages(turns), self.figures[name]: as_figures(turns)}
