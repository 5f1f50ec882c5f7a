"""One model that many visitors share.

A single thread uses the model, and answers one question at a time. A setting is one of
`vzip.runs.compare.SETTINGS`: "full", "free" (training-free) or "tuned".
"""

import queue
from collections.abc import Callable, Generator, Iterator, Sequence
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
WARM_UP_TOKENS = 3
"""Number of tokens generated in each setting before the page opens."""


@dataclass(frozen=True)
class Turn:
    """A question asked in one setting, and its answer."""

    question: str
    answer: Answer | None
    """The answer so far. None before the first token, or if the question was refused."""
    refusal: str = ""
    """Why there is no answer."""


@dataclass(frozen=True)
class PictureTokens:
    """The tokens that a reducer keeps of a picture."""

    tile: TileTokens
    """The first tile, which shows the whole picture."""
    num_tiles: int
    num_tokens: int
    """Visual tokens of the whole picture, all tiles together."""
    num_full_tokens: int
    """Visual tokens of the whole picture without a reducer."""


class SharedModel:
    """A model in its settings, for any number of visitors.

    Args:
        comparison: the model, opened from a run or a base model.
        max_new_tokens: most tokens of an answer.

    Attributes:
        settings: names of the settings.
        tuned_budgets: budgets that the projector was tuned for. Empty for a base model.
        budgets: budgets that the page offers.
        default_budget: budget that the page begins with.
    """

    def __init__(self, comparison: Comparison, *, max_new_tokens: int) -> None:
        self.comparison = comparison
        self.max_new_tokens = max_new_tokens
        self.settings = comparison.rows
        self.tuned_budgets: Sequence[int] = list(comparison.reducers)

        # A budget is a multiple of `step`, from one token per tile to all tokens.
        step = comparison.family.budget_tiles
        most = comparison.family.num_patches * step

        if self.tuned_budgets:
            self.default_budget = self.tuned_budgets[0]
        else:
            # A ninth is the paper's smallest budget: 64 of 576 tokens.
            self.default_budget = max(step, most // 9 // step * step)

        # If only a run's tuned projector is left, the page offers the run's own budgets alone.
        self.budgets: Sequence[int] = sorted(self.tuned_budgets)
        if self._takes_any_budget(step):
            self.budgets = range(step, most + 1, step)

        # One thread uses the model, so visitors wait for each other without any lock.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._stopped = Event()

    def _takes_any_budget(self, budget: int) -> bool:
        """Whether there is a training-free setting, whose budget can be changed."""
        # The tuned setting refuses budgets that it was not tuned for.
        try:
            self.comparison.reducer("free", budget=budget)
        except UserError:
            return False
        return True

    def run_alone(self, work: Callable[[], T]) -> T:
        """Call `work` while nobody else uses the model, and return its result."""
        return self._thread.submit(work).result()

    def stream(self, work: Callable[[], Iterator[T]]) -> Iterator[T]:
        """Yield the values of `work`, which runs while nobody else uses the model.

        If the reader stops early, `work` is closed in the model's thread. So the model never stays
        in the setting that `work` has put it in.
        """
        # Each value is put into a tuple, so that the empty tuple can mark the end.
        values: queue.SimpleQueue[tuple[T, ...]] = queue.SimpleQueue()
        reader_left = Event()

        def run() -> None:
            # The end mark comes in any case: without it, the reader would wait for ever.
            try:
                with closing(work()) as produced:
                    for value in produced:
                        if reader_left.is_set() or self._stopped.is_set():
                            break
                        values.put((value,))
            finally:
                values.put(())

        job = self._thread.submit(run)
        try:
            while value := values.get():
                yield value[0]
        finally:
            reader_left.set()

        # An error of `work` was raised in the other thread. Raise it here again.
        job.result()

    def stop(self) -> None:
        """End the answer that is being generated, so that the command can end."""
        # Do not wait for the thread: it stops by itself at the next token.
        self._stopped.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def nearest_budget(self, value: float) -> int:
        """Return the offered budget that is nearest to the slider's value."""
        return min(self.budgets, key=lambda budget: abs(budget - value))

    def reducer(self, budget: int) -> Reducer:
        """Return the reducer of the reduced settings."""
        # Both reduced settings have the same reducer, but one of them may be missing.
        setting = "free" if "free" in self.settings else "tuned"
        return self.comparison.reducer(setting, budget=budget)

    def look(self, picture: Image.Image, budget: int) -> PictureTokens:
        """Find out which tokens of a picture the reducer keeps."""
        family = self.comparison.family
        image_processor = self.comparison.processor.image_processor
        reducer = self.reducer(budget)
        size = (picture.height, picture.width)

        # Only the first call computes anything. The counts follow from the picture's size.
        return PictureTokens(
            tile=self.run_alone(lambda: look(family, reducer, image_processor, picture)),
            num_tiles=family.num_tiles(size),
            num_tokens=family.num_image_tokens(reducer, size),
            num_full_tokens=family.num_image_tokens(Identity(), size),
        )

    def warm_up(self) -> None:
        """Ask once in each setting.

        The first answer is slow, because libraries initialise themselves.
        """
        # A small picture and a few tokens are enough.
        session = Session(self, Image.new("RGB", (64, 64)), self.default_budget)
        for setting in session.open_settings:
            with closing(session.ask(setting, "What is this?")) as turns:
                for _, _ in zip(range(WARM_UP_TOKENS), turns, strict=False):
                    pass


# eq=False: two visitors with the same picture and budget still have different sessions.
@dataclass(eq=False)
class Session:
    """One visitor's questions about one picture at one budget.

    Each setting has its own KV cache.
    """

    model: SharedModel
    picture: Image.Image
    budget: int
    turns: dict[str, list[Turn]] = field(init=False)
    """Turns so far in each setting."""

    def __post_init__(self) -> None:
        self.turns = {setting: [] for setting in self.model.settings}
        self._chats: dict[str, Chat] = {}

    def num_visual_tokens(self, setting: str) -> int:
        """Count the visual tokens of the picture in a setting that can be asked."""
        comparison = self.model.comparison
        size = (self.picture.height, self.picture.width)
        reducer = comparison.reducer(setting, budget=self.budget)
        return comparison.family.num_image_tokens(reducer, size)

    def why_closed(self, setting: str) -> str:
        """Say why a setting can't be asked at this budget. Empty if it can."""
        # Only the tuned projector depends on the budget.
        if setting != "tuned" or self.budget in self.model.tuned_budgets:
            return ""

        budgets = " or ".join(str(budget) for budget in self.model.tuned_budgets)
        return f"for a budget of {budgets} alone; move the slider there"

    @property
    def open_settings(self) -> list[str]:
        """The settings that can be asked."""
        return [setting for setting in self.model.settings if not self.why_closed(setting)]

    def restart(self) -> "Session":
        """Make a new session about the same picture at the same budget."""
        return Session(self.model, self.picture, self.budget)

    def ask(self, setting: str, question: str) -> Generator[Turn]:
        """Ask a question, and yield the turn as its answer grows.

        A question that can't be asked yields one turn with the reason.
        """
        turns = self.turns[setting]
        turns.append(Turn(question, None))

        # This runs in the model's thread. It puts the model into the setting for this answer alone,
        # because the next visitor may ask in another one.
        def work() -> Iterator[Answer]:
            comparison = self.model.comparison
            with comparison.row(setting, budget=self.budget) as (model, processor):
                # A chat keeps the KV cache, so the next turn computes only what is new.
                if setting not in self._chats:
                    self._chats[setting] = Chat(
                        model,
                        processor,
                        self.picture,
                        max_new_tokens=self.model.max_new_tokens,
                    )
                yield from self._chats[setting].ask(question)

        # The page shows `turns`, so each longer answer replaces the last one.
        try:
            for answer in self.model.stream(work):
                turns[-1] = Turn(question, answer)
                yield turns[-1]
        except (UserError, torch.OutOfMemoryError) as error:
            # A conversation that got too long must not end the page for all others.
            turns[-1] = Turn(question, None, refusal=str(error))
            yield turns[-1]
