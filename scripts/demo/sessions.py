"""The rows of a comparison for many conversations: one model, which one thread has to itself, one question at a time."""

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event
from typing import TypeVar

import torch
from PIL import Image

from vzip import Comparison, UserError
from vzip.chat import Answer, Chat
from vzip.overlay import TileTokens, look
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """A question in one row, and what came of it."""

    question: str
    answer: Answer | None
    """None until the first token, and where `refusal` says why there is none."""
    refusal: str = ""


@dataclass(frozen=True)
class Seen:
    """A picture behind the reducer."""

    tile: TileTokens
    num_tiles: int
    num_tokens: int
    """Visual tokens of the whole picture."""
    num_full_tokens: int
    """The same in the row `full`."""


class SharedModel:
    """What can be asked of a comparison, by any number of conversations.

    Args:
        comparison: of a run or a base model.
        max_new_tokens: of an answer.

    Attributes:
        names: of the rows.
        budgets: those that the page offers.
        budget: the one that it begins with.
    """

    def __init__(self, comparison: Comparison, *, max_new_tokens: int) -> None:
        self.comparison, self.max_new_tokens = comparison, max_new_tokens
        self.names = comparison.rows
        self.tuned: Sequence[int] = list(comparison.reducers)
        step = comparison.family.budget_tiles
        most = comparison.family.num_patches * step
        self.budget = (
            self.tuned[0] if self.tuned else max(step, most // 9 // step * step)
        )  # 64 of 576, the paper's smallest
        self.budgets: Sequence[int] = (
            range(step, most + 1, step) if self._takes_any_budget(step) else sorted(self.tuned)
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def _takes_any_budget(self, budget: int) -> bool:
        try:
            self.comparison.reducer("free", budget=budget)
        except UserError:  # a reducer without one, or a run of which only the tuned projector is left
            return False
        return True

    def alone(self, work: Callable[[], T]) -> T:
        """What `work` returns when it has the model to itself."""
        return self._thread.submit(work).result()

    def stream(self, work: Callable[[], Iterator[T]]) -> Iterator[T]:
        """The values of `work`, made in the model's thread as in `alone`.

        Work whose reader leaves is stopped and closed there, so that the model is never left in its row.
        """
        values: queue.SimpleQueue[tuple[T, ...]] = queue.SimpleQueue()
        left = Event()

        def run() -> None:
            try:
                with closing(work()) as made:
                    for value in made:
                        if left.is_set():
                            break
                        values.put((value,))
            finally:
                values.put(())

        job = self._thread.submit(run)
        try:
            while value := values.get():
                yield value[0]
        finally:
            left.set()
        job.result()  # raises what the work did

    def nearest(self, budget: float) -> int:
        """The offered budget that is nearest to what a slider says."""
        return min(self.budgets, key=lambda offered: abs(offered - budget))

    def reducer(self, budget: int) -> Reducer:
        """The one of the reduced rows at one of the budgets."""
        return self.comparison.reducer("free" if "free" in self.names else "tuned", budget=budget)

    def look(self, picture: Image.Image, budget: int) -> Seen:
        """What the reducer makes of a picture."""
        reducer, family = self.reducer(budget), self.comparison.family
        size = picture.height, picture.width
        return Seen(
            tile=self.alone(
                lambda: look(family, reducer, self.comparison.processor.image_processor, picture)
            ),
            num_tiles=family.num_tiles(size),
            num_tokens=family.num_image_tokens(reducer, size),
            num_full_tokens=family.num_image_tokens(Identity(), size),
        )

    def warm_up(self) -> None:
        """Ask once in each row, so that no row's first answer pays for what libraries do when they first run."""
        conversation = Session(self, Image.new("RGB", (64, 64)), self.budget)
        for name in conversation.open_rows:
            for _ in zip(range(3), conversation.ask(name, "What is this?"), strict=False):
                pass


@dataclass(eq=False)  # the page keeps it as it is, one a visitor
class Session:
    """Questions about one picture at one budget, each row with its own cache."""

    rows: SharedModel
    picture: Image.Image
    budget: int
    turns: dict[str, list[Turn]] = field(init=False)
    """Of each row."""

    def __post_init__(self) -> None:
        self.turns = {name: [] for name in self.rows.names}
        self._chats: dict[str, Chat] = {}

    def num_visual_tokens(self, name: str) -> int:
        """Of the picture in a row that can be asked."""
        comparison, size = self.rows.comparison, (self.picture.height, self.picture.width)
        return comparison.family.num_image_tokens(comparison.reducer(name, budget=self.budget), size)

    def closed(self, name: str) -> str:
        """Why a row can't be asked at this budget; "" where it can."""
        if name != "tuned" or self.budget in self.rows.tuned:
            return ""
        return f"for a budget of {' or '.join(map(str, self.rows.tuned))} alone; move the slider there"

    @property
    def open_rows(self) -> list[str]:
        """Those that can be asked."""
        return [name for name in self.rows.names if not self.closed(name)]

    def restart(self) -> "Session":
        """A new one about the same picture."""
        return Session(self.rows, self.picture, self.budget)

    def ask(self, name: str, question: str) -> Iterator[Turn]:
        """The turn as its answer grows. A question that is refused is a turn that says so."""
        turns = self.turns[name]
        turns.append(Turn(question, None))

        def work() -> Iterator[Answer]:
            with self.rows.comparison.row(name, budget=self.budget) as (model, processor):
                if name not in self._chats:
                    self._chats[name] = Chat(
                        model, processor, self.picture, max_new_tokens=self.rows.max_new_tokens
                    )
                yield from self._chats[name].ask(question)

        try:
            for answer in self.rows.stream(work):
                turns[-1] = Turn(question, answer)
                yield turns[-1]
        except (UserError, torch.OutOfMemoryError) as error:
            turns[-1] = Turn(question, None, refusal=str(error))
            yield turns[-1]
