"""The demo's page: pictures of the tokens, and the answers of all settings side by side.

The page loads nothing from any other host.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Gradio reads this when it is imported, and would send data about the page to its servers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.demo.sessions import Session, SharedModel
from scripts.demo.show import as_figures, as_messages, describe_tokens, open_upload
from vzip import UserError
from vzip.overlay import attention_map, kept_tokens, merged_tokens

SIDE = 480
"""Side of a drawing in pixels."""
SECONDS_BETWEEN_UPDATES = 0.1
"""Seconds between two updates of a growing answer. Each update takes time from the model."""
PROJECTORS = {"full": "base projector", "free": "base projector", "tuned": "tuned projector"}
"""The projector of each setting, as the page names it."""
DRAWINGS = {
    "**Kept**: dominant orange, merge targets blue": kept_tokens,
    "**Merged**: one colour and number, one token": merged_tokens,
    "**Attention**: violet little, yellow most": attention_map,
}
"""Title of each drawing, and the function that draws it."""
NO_PICTURE = "Upload a picture, or choose one, to see its tokens."
FOOTNOTE = (
    "*Prompt run*: the tokens of the conversation that were computed in this turn. The others were in "
    "the KV cache. The settings answer greedily, one after the other, so that each is timed alone."
)
# The rules replace what Gradio's own options can't set: widths, the grid of examples, small tables.
STYLE = """
.gradio-container > main, .gradio-container { max-width: 1280px; width: 100%; margin: 0 auto; }
.message:not(:empty) p { border-left: 4px solid #d55e00; padding: .25rem .75rem; }
.drawing img { image-rendering: pixelated; }
.drawing:not(:hover) .icon-button-wrapper { opacity: 0; }
#examples .grid-wrap { height: auto; min-height: 0; padding-top: 2rem; }
#examples .grid-container { height: auto; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
#examples .grid-container { grid-auto-rows: auto !important; }
#examples .grid-container button { aspect-ratio: 1; height: auto; }
.answers button[aria-label="Clear"] { display: none; }
.figures table { font-size: .85em; width: 100%; }
.figures th, .figures td { padding: .15rem .4rem !important; white-space: nowrap; }
.figures th, .figures td { border-color: #8884 !important; }
"""

Updates = dict[Any, Any]
"""New values of components, by component, as Gradio takes them."""


class NoOtherHosts:
    """Middleware that tells browsers to load nothing for the page from any other host."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An answer's headers are sent first, in a message of their own.
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", self.POLICY)
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class ExamplePicture:
    """A held-out picture with a question about it."""

    picture: Image.Image
    question: str


class Page:
    """The page's components, and the reactions when a visitor uses them.

    Args:
        model: the model that answers.
        title: name of the model, as Markdown.
        examples: pictures offered beside the upload. The first one is shown when the page opens.
    """

    def __init__(self, model: SharedModel, *, title: str, examples: Sequence[ExamplePicture]) -> None:
        self.model = model
        self.examples = examples
        # Gradio looks at uploaded files every 600 s, and deletes those older than 3,600 s.
        delete_cache = (600, 3600)
        with gr.Blocks(title="vzip", analytics_enabled=False, delete_cache=delete_cache) as self.blocks:
            # The picture and its tokens stand side by side, the answers of all settings below.
            self.session = gr.State(None, time_to_live=3600)
            gr.Markdown(f"# Which visual tokens stay, and how the model answers\n{title}")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._build_input()
                with gr.Column(scale=3, min_width=280):
                    self._build_drawings()
                    self._build_budget()
            self._build_question()
            with gr.Row():
                self._build_answers()
            gr.Markdown(FOOTNOTE)
            self.new_conversation = gr.Button("New conversation", size="sm", elem_id="again")

            # Last, because events name their components.
            self._connect()

    def _build_input(self) -> None:
        """Build the upload, and the examples below it."""
        # `filepath` gives the file itself: `choose` opens it, with limits that Gradio lacks.
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
            [example.picture for example in self.examples],
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
        """Build the drawings of the tokens, and the summary in numbers."""
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

    def _build_budget(self) -> None:
        """Build the slider of budgets, which is hidden if there is only one."""
        # Say what a budget counts: several tiles together, one tile, or the whole picture.
        family = self.model.comparison.family
        if family.budget_tiles > 1:
            unit = f"{family.budget_tiles} tiles"
        elif len(family.image_sizes) > 1:
            unit = "a tile"
        else:
            unit = "a picture"

        budgets = self.model.budgets
        self.budget = gr.Slider(
            budgets[0],
            budgets[-1],
            value=self.model.default_budget,
            step=family.budget_tiles,
            label=f"Budget: visual tokens of {unit}",
            info="Another budget starts another conversation.",
            visible=len(budgets) > 1,
            buttons=[],
            elem_id="budget",
        )

    def _build_question(self) -> None:
        self.question = gr.Textbox(
            label="Question",
            placeholder="Ask about the picture, in as many turns as you like",
            submit_btn="Ask",
            elem_id="question",
        )
        self.hint = gr.Markdown(elem_id="hint", elem_classes="message")

    def _build_answers(self) -> None:
        """Build one column for each setting: its title, its conversation and its timings."""
        self.titles: dict[str, gr.Markdown] = {}
        self.answers: dict[str, gr.Chatbot] = {}
        self.figures: dict[str, gr.Markdown] = {}
        for setting in self.model.settings:
            with gr.Column(min_width=280):
                self.titles[setting] = gr.Markdown(
                    self._title(setting, None),
                    elem_id=f"title-{setting}",
                )
                self.answers[setting] = gr.Chatbot(
                    show_label=False,
                    height=280,
                    render_markdown=False,
                    buttons=[],
                    feedback_options=None,
                    elem_classes="answers",
                    elem_id=f"answers-{setting}",
                )
                self.figures[setting] = gr.Markdown(
                    elem_id=f"figures-{setting}",
                    elem_classes="figures",
                )

    def _title(self, setting: str, session: Session | None) -> str:
        """Return the text above a setting's answers."""
        if session is None:
            return f"**{setting}**: {PROJECTORS[setting]}"
        if reason := session.why_closed(setting):
            return f"**{setting}**: {reason}"
        num_tokens = session.num_visual_tokens(setting)
        return f"**{setting}**: {num_tokens:,} visual tokens, {PROJECTORS[setting]}"

    def _outputs(self) -> list[Any]:
        """List all components that a visitor's action may change."""
        return [
            self.session,
            self.picture,
            self.message,
            self.hint,
            self.summary,
            self.question,
            *self.drawings,
            *self.titles.values(),
            *self.answers.values(),
            *self.figures.values(),
        ]

    def _connect(self) -> None:
        """Connect each action of a visitor with one of the methods below."""
        # All events wait in one queue, so that nothing else runs while an answer is timed.
        one_at_a_time = {
            "outputs": self._outputs(),
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "minimal",
        }

        # Gradio's own preprocessing would open every format that PIL knows. `choose` opens fewer.
        as_uploaded = {**one_at_a_time, "preprocess": False}
        self.picture.upload(self.choose, [self.picture, self.budget], **as_uploaded)
        self.picture.clear(self.clear, None, **one_at_a_time)
        self.gallery.select(self.pick, [self.budget], **one_at_a_time)
        if self.examples:
            self.blocks.load(self.show_first_example, [self.budget], **one_at_a_time)

        # While the slider moves, only its last value starts a session.
        last_value = {**one_at_a_time, "trigger_mode": "always_last"}
        self.budget.change(self.change_budget, [self.session, self.budget], **last_value)

        self.new_conversation.click(self.restart, [self.session], **one_at_a_time)
        self.question.submit(self.ask, [self.session, self.question], **one_at_a_time)

    def _begin(self, picture: Image.Image, slider: float) -> Updates:
        """Start a session about a picture, and draw its tokens."""
        # The slider also stops between the budgets that a run was tuned for.
        budget = self.model.nearest_budget(slider)
        tokens = self.model.look(picture, budget)
        session = Session(self.model, picture, budget)

        # Replace everything that belongs to the previous picture.
        updates = {self.message: "", self.summary: describe_tokens(tokens)}
        for component, draw in zip(self.drawings, DRAWINGS.values(), strict=True):
            updates[component] = draw(tokens.tile, side=SIDE)
        return {**updates, **self._show_turns(session)}

    def _show_turns(self, session: Session | None) -> Updates:
        """Show the turns of a session in all settings."""
        # Without a session the columns are emptied.
        updates: Updates = {self.session: session, self.hint: ""}
        for setting in self.model.settings:
            turns = session.turns[setting] if session else []
            updates[self.titles[setting]] = self._title(setting, session)
            updates[self.answers[setting]] = as_messages(turns)
            updates[self.figures[setting]] = as_figures(turns)
        return updates

    def _show_example(self, index: int, slider: float) -> Updates:
        example = self.examples[index]
        return {
            **self._begin(example.picture, slider),
            self.picture: example.picture,
            self.question: example.question,
        }

    def show_first_example(self, slider: float) -> Updates:
        """Handle the opening of the page."""
        return self._show_example(0, slider)

    def choose(self, file: dict[str, Any], slider: float) -> Updates:
        """Handle an uploaded file."""
        try:
            picture = open_upload(file["path"])
        except UserError as error:
            return {**self.clear(), self.message: str(error)}
        return self._begin(picture, slider)

    def pick(self, slider: float, event: gr.SelectData) -> Updates:
        """Handle the choice of an example."""
        return self._show_example(event.index, slider)

    def clear(self) -> Updates:
        """Handle the removal of the picture."""
        updates: Updates = dict.fromkeys([self.picture, *self.drawings])
        updates[self.message] = ""
        updates[self.summary] = NO_PICTURE
        return {**updates, **self._show_turns(None)}

    def change_budget(self, session: Session | None, slider: float) -> Updates:
        """Handle another budget. Other tokens are kept, so another session starts."""
        if session is None:
            return {self.message: ""}
        return self._begin(session.picture, slider)

    def restart(self, session: Session | None) -> Updates:
        """Handle the button for a new conversation about the same picture."""
        return self._show_turns(session.restart() if session else None)

    def ask(self, session: Session | None, question: str) -> Iterator[Updates]:
        """Ask a question in all settings, one after the other, so that each is timed alone."""
        if session is None:
            yield {self.hint: "Choose a picture first, then ask about it."}
            return
        if not question.strip():
            yield {self.hint: "Type a question."}
            return

        # Empty the question's box at once, so that the visitor sees that the question was accepted.
        yield {self.hint: "", self.question: ""}
        for setting in session.open_settings:
            # `session.ask` changes these turns, while it yields the growing answer.
            turns = session.turns[setting]
            last_update = 0.0
            for _ in session.ask(setting, question.strip()):
                if time.monotonic() - last_update > SECONDS_BETWEEN_UPDATES:
                    yield {self.answers[setting]: as_messages(turns)}
                    last_update = time.monotonic()

            # The timings are complete only when the answer is.
            yield {
                self.answers[setting]: as_messages(turns),
                self.figures[setting]: as_figures(turns),
            }
