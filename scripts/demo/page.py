"""The demo's page: pictures of the tokens, and the answers of all settings side by side.

The page loads nothing from any other host.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from scripts.demo.guard import UploadsOnly, get_upload_folder, gr
from scripts.demo.served import SERVED
from scripts.demo.sessions import OUT_OF_MEMORY, Session, SharedModel
from scripts.demo.show import as_figures, as_messages, describe_tokens
from scripts.demo.uploads import MAX_QUESTION, check_question, open_upload, uploaded_file
from vzip import UserError
from vzip.overlay import attention_map, kept_tokens, merged_tokens

SIDE = 480
"""Side of a drawing in pixels."""
SECONDS_BETWEEN_UPDATES = 0.1
"""Seconds between two updates of a growing answer. Each update takes time from the model."""
MAX_ANSWERS = 8
"""Number of visitors whose questions are answered at the same time, in turns. Others wait in a queue."""
MAX_WAITING = 64
"""Length of that queue. Who comes when it is full is told to try again."""
SECONDS_KEPT = 3600
"""After so many seconds without a question, a conversation is forgotten. So is an uploaded file."""
PROJECTORS = {
    "full": "base projector",
    "free": "base projector",
    "tuned": "tuned projector",
    SERVED: "a server, at its own budget",
}
"""The projector of each setting, as the page names it."""
DRAWINGS = {
    "**Kept**: dominant orange, merge targets blue": kept_tokens,
    "**Merged**: one colour and number, one token": merged_tokens,
    "**Attention**: violet little, yellow most": attention_map,
}
"""Title of each drawing, and the function that draws it."""
NO_SESSION = "Choose a picture first, then ask about it."
NO_PICTURE = "Upload a picture, or choose one, to see its tokens."
FOOTNOTE = (
    "*Prompt run*: the tokens of the conversation that were computed in this turn. The others were in "
    "the KV cache. The settings answer greedily, one after the other, and only the time in which the "
    "model worked on the answer is counted."
)

Updates = dict[Any, Any]
"""New values of components, by component, as Gradio takes them."""


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
        # Gradio looks every 600 s for uploaded files that are too old.
        delete_cache = (600, SECONDS_KEPT)
        self.blocks = UploadsOnly(title="vzip", analytics_enabled=False, delete_cache=delete_cache)
        with self.blocks:
            # The picture and its tokens stand side by side, the answers of all settings below.
            self.session = gr.State(None, time_to_live=SECONDS_KEPT, delete_callback=model.forget)
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
        self.blocks.queue(max_size=MAX_WAITING, api_open=False)

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
        """Build the slider of budgets, unless there is only one."""
        budgets = self.model.budgets
        if len(budgets) == 1:
            # A slider of one value can't be built. The events need the value all the same.
            self.budget = gr.State(self.model.default_budget)
            return

        # Say what a budget counts: several tiles together, one tile, or the whole picture.
        family = self.model.comparison.family
        if family.budget_tiles > 1:
            unit = f"{family.budget_tiles} tiles"
        elif len(family.image_sizes) > 1:
            unit = "a tile"
        else:
            unit = "a picture"

        self.budget = gr.Slider(
            budgets[0],
            budgets[-1],
            value=self.model.default_budget,
            step=family.budget_tiles,
            label=f"Budget: visual tokens of {unit}",
            info="Another budget starts another conversation.",
            buttons=[],
            elem_id="budget",
        )

    def _build_question(self) -> None:
        self.question = gr.Textbox(
            label="Question",
            placeholder="Ask about the picture, in as many turns as you like",
            submit_btn="Ask",
            max_length=MAX_QUESTION,
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
        if session is None or setting == SERVED:
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
        # What visitors send is not preprocessed: Gradio would open every format that PIL knows, and
        # write a traceback into the log where the page has a message.
        common = {"outputs": self._outputs(), "show_progress": "minimal", "preprocess": False}
        asked = self.question.submit(
            self.ask,
            [self.session, self.question, self.picture, self.budget],
            concurrency_id="answers",
            concurrency_limit=MAX_ANSWERS,
            **common,
        )

        # Pictures have a queue of their own, because long answers would hold them up. Each event
        # begins another conversation, so an answer that still grows is given up.
        begin = {**common, "concurrency_id": "pictures", "concurrency_limit": 2, "cancels": [asked]}
        self.picture.upload(self.choose, [self.picture, self.budget], **begin)
        self.picture.clear(self.clear, None, **begin)
        self.gallery.select(self.pick, [self.budget], **begin)
        if self.examples:
            self.blocks.load(self.show_first_example, [self.budget], **begin)

        # While the slider moves, only its last value starts a session.
        if isinstance(self.budget, gr.Slider):
            last_value = {**begin, "trigger_mode": "always_last"}
            self.budget.change(self.change_budget, [self.session, self.budget], **last_value)
        self.new_conversation.click(self.restart, [self.session], **begin)

    def _begin(self, make_session: Callable[[], Session]) -> Updates:
        """Start a session, and draw the tokens of its picture. If that fails, show why."""
        try:
            session = make_session()
            picture = session.open_picture()
            tokens = self.model.look(picture, session.budget)
        except UserError as error:
            return {**self.clear(), self.message: str(error)}
        except torch.OutOfMemoryError:
            return {**self.clear(), self.message: OUT_OF_MEMORY}
        self.model.keep_open(session)

        # Replace everything that belongs to the previous picture.
        updates = {self.message: "", self.summary: describe_tokens(tokens)}
        for component, draw in zip(self.drawings, DRAWINGS.values(), strict=True):
            updates[component] = draw(tokens.tile, side=SIDE)
        return {**updates, **self._show_turns(session)}

    def _open(self, file: object, slider: float) -> Session:
        """Make a session about an uploaded file. Raises UserError if it is not one."""
        path = uploaded_file(file, get_upload_folder())
        return Session(self.model, open_upload(path), self.model.nearest_budget(slider), path)

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
        # The slider also stops between the budgets that a run was tuned for.
        budget = self.model.nearest_budget(slider)
        return {
            self.picture: example.picture,
            self.question: example.question,
            **self._begin(lambda: Session(self.model, example.picture, budget)),
        }

    def show_first_example(self, slider: float) -> Updates:
        """Handle the opening of the page."""
        return self._show_example(0, slider)

    def choose(self, file: object, slider: float) -> Updates:
        """Handle an uploaded file."""
        return self._begin(lambda: self._open(file, slider))

    def pick(self, slider: float, event: gr.SelectData) -> Updates:
        """Handle the choice of an example."""
        # A request may name any example.
        if event.index not in range(len(self.examples)):
            return {self.message: "There is no such example."}
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
        self.model.forget(session)
        return self._begin(lambda: session.restart(self.model.nearest_budget(slider)))

    def restart(self, session: Session | None) -> Updates:
        """Handle the button for a new conversation about the same picture."""
        if session is None:
            return self._show_turns(None)
        self.model.forget(session)
        return self._begin(session.restart)

    def ask(
        self,
        session: Session | None,
        question: object,
        file: object = None,
        slider: float = 0,
    ) -> Iterator[Updates]:
        """Ask a question in all settings, one after the other.

        Without a session, one begins with the picture that the page still shows.
        """
        try:
            text = check_question(question)
        except UserError as error:
            yield {self.hint: str(error)}
            return

        # The session was forgotten: the page was left for long, or too many visitors came since.
        if session is None and file is not None:
            updates = self._begin(lambda: self._open(file, slider))
            session = updates[self.session]
            yield updates
        if session is None:
            yield {self.hint: NO_SESSION}
            return

        # A browser waits for its answer. Another program may not.
        if not session.in_use.acquire(blocking=False):
            yield {self.hint: "Wait for the answer to the last question."}
            return
        try:
            yield from self._answer(session, text)
        finally:
            session.in_use.release()

    def _answer(self, session: Session, question: str) -> Iterator[Updates]:
        """Ask in all settings, and show the answers as they grow."""
        # Empty the question's box at once, so that the visitor sees that the question was accepted.
        yield {self.hint: "", self.question: ""}
        for setting in session.open_settings:
            # `session.ask` changes these turns, while it yields the growing answer.
            turns = session.turns[setting]
            last_update = 0.0
            with closing(session.ask(setting, question)) as growing:
                for _ in growing:
                    if time.monotonic() - last_update > SECONDS_BETWEEN_UPDATES:
                        yield {self.answers[setting]: as_messages(turns)}
                        last_update = time.monotonic()

            # The timings are complete only when the answer is. The session is shown as used now.
            yield {
                self.session: session,
                self.answers[setting]: as_messages(turns),
                self.figures[setting]: as_figures(turns),
            }
