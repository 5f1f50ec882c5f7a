"""One model that many visitors share, and their conversations.

A setting is one of `vzip.runs.compare.SETTINGS`: "full", "free" (training-free) or "tuned". A model
that a server answers for is one more, "served".
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image

from scripts.demo.served import SERVED, ServedModel
from scripts.demo.turns import ModelThread
from scripts.demo.uploads import open_upload
from vzip import Comparison, UserError
from vzip.chat import Answer, Chat
from vzip.overlay import TileTokens, look
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity

WARM_UP_TOKENS = 3
"""Number of tokens generated in each setting before the page opens."""
MAX_OPEN_SESSIONS = 8
"""Number of sessions that have their picture and their KV caches in memory.

The others keep only their text, and open the picture again with the next question.
"""
OUT_OF_MEMORY = "The model's memory ran out. Ask again, or start a new conversation."


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
        served: a model that a server answers for.

    Attributes:
        settings: names of the settings.
        tuned_budgets: budgets that the projector was tuned for. Empty for a base model.
        budgets: budgets that the page offers.
        default_budget: budget that the page begins with.
        thread: the thread that uses the model. Nothing else may.
    """

    def __init__(
        self, comparison: Comparison, *, max_new_tokens: int, served: ServedModel | None = None
    ) -> None:
        self.comparison = comparison
        self.max_new_tokens = max_new_tokens
        self.served = served
        self.settings = comparison.rows if served is None else (*comparison.rows, SERVED)
        self.tuned_budgets: Sequence[int] = list(comparison.reducers)

        # A budget is a multiple of `step`, from one token per tile to all tokens.
        step = comparison.family.budget_tiles
        most = comparison.family.num_groups * step

        if self.tuned_budgets:
            self.default_budget = self.tuned_budgets[0]
        else:
            # A ninth is the paper's smallest budget: 64 of 576 tokens.
            self.default_budget = max(step, most // 9 // step * step)

        # If only a run's tuned projector is left, the page offers the run's own budgets alone.
        self.budgets: Sequence[int] = sorted(self.tuned_budgets)
        if self._takes_any_budget(step):
            self.budgets = range(step, most + 1, step)

        self.thread = ModelThread()

        # The sessions with anything large in memory, the one that was used last at the end.
        self._open_sessions: list[Session] = []
        self._lock = Lock()

    def _takes_any_budget(self, budget: int) -> bool:
        """Whether there is a training-free setting, whose budget can be changed."""
        # The tuned setting refuses budgets that it was not tuned for.
        try:
            self.comparison.reducer("free", budget=budget)
        except UserError:
            return False
        return True

    def keep_open(self, session: "Session") -> None:
        """Keep what a session has in memory, and close those that were used longest ago."""
        self._close_others(session, num_kept=MAX_OPEN_SESSIONS)

    def close_others(self, session: "Session") -> None:
        """Close all sessions but this one, and those that are being answered."""
        self._close_others(session, num_kept=1)

    def _close_others(self, session: "Session", *, num_kept: int) -> None:
        with self._lock:
            others = [other for other in self._open_sessions if other is not session]
            surplus = len(others) + 1 - num_kept

            # A session that is being answered can't be closed, so the next one is.
            kept = []
            for other in others:
                if surplus > 0 and other.close():
                    surplus -= 1
                else:
                    kept.append(other)
            self._open_sessions = [*kept, session]

    def forget(self, session: "Session | None") -> None:
        """Close a session that is not used any more."""
        with self._lock:
            if session is not None and session.close():
                self._open_sessions = [other for other in self._open_sessions if other is not session]

    def nearest_budget(self, value: float) -> int:
        """Return the offered budget that is nearest to the slider's value."""
        # A request may hold anything.
        if not isinstance(value, int | float) or not math.isfinite(value):
            return self.default_budget
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
            tile=self.thread.run_alone(lambda: look(family, reducer, image_processor, picture)),
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
        self.forget(session)


# eq=False: two visitors with the same picture and budget still have different sessions.
@dataclass(eq=False)
class Session:
    """One visitor's questions about one picture at one budget.

    Each setting has its own KV cache. `SharedModel.keep_open` bounds how many sessions have their
    caches, and their picture, in memory.
    """

    model: SharedModel
    picture: Image.Image | None
    """The picture, or None while it is not in memory."""
    budget: int
    file: Path | None = None
    """Where the picture is opened again. Without a file it always stays in memory."""
    turns: dict[str, list[Turn]] = field(init=False)
    """Turns so far in each setting."""
    in_use: Lock = field(init=False, default_factory=Lock)
    """Held while a question is answered, so that there is one at a time."""

    def __post_init__(self) -> None:
        self.turns = {setting: [] for setting in self.model.settings}
        self._size = self.open_picture().size
        self._chats: dict[str, Chat] = {}
        # The turns of settings whose chat, with its KV cache, is closed.
        self._messages: dict[str, list[dict[str, Any]]] = {}

    def open_picture(self) -> Image.Image:
        """Return the picture, which is read again if it is not in memory.

        Raises:
            UserError: the file is gone.
        """
        picture = self.picture
        if picture is None:
            assert self.file is not None
            picture = open_upload(self.file)
            self.picture = picture
        return picture

    def close(self) -> bool:
        """Drop the KV caches and the picture, unless a question is being answered.

        The session can still be asked: what is dropped is then made again.
        """
        if not self.in_use.acquire(blocking=False):
            return False
        try:
            for setting, chat in self._chats.items():
                self._messages[setting] = chat.messages
            self._chats.clear()
            if self.file is not None:
                self.picture = None
        finally:
            self.in_use.release()
        return True

    def num_visual_tokens(self, setting: str) -> int:
        """Count the visual tokens of the picture in a setting that can be asked."""
        comparison = self.model.comparison
        width, height = self._size
        reducer = comparison.reducer(setting, budget=self.budget)
        return comparison.family.num_image_tokens(reducer, (height, width))

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

    def restart(self, budget: int | None = None) -> "Session":
        """Make a new session about the same picture, by default at the same budget."""
        return Session(self.model, self.picture, budget or self.budget, self.file)

    def _chat(self, setting: str, model: Any, processor: Any) -> Chat:
        """Return the chat of a setting, which keeps the KV cache from one question to the next."""
        self.model.keep_open(self)
        if setting not in self._chats:
            chat = Chat(
                model,
                processor,
                self.open_picture(),
                max_new_tokens=self.model.max_new_tokens,
            )
            # A picture may take 150 MB, so the chats share it. It is upright and RGB already.
            chat.picture = self.open_picture()
            chat.messages = self._messages.get(setting, [])
            self._chats[setting] = chat
        return self._chats[setting]

    def _answers(self, setting: str, question: str) -> Generator[Answer]:
        """Yield the growing answer of one of the model's own settings."""

        # Both are called in the model's thread. Other visitors, in other settings, have their turns
        # between those of this answer.
        def setting_of_model() -> AbstractContextManager[tuple[Any, Any]]:
            return self.model.comparison.row(setting, budget=self.budget)

        def answers(entered: tuple[Any, Any]) -> Iterator[Answer]:
            yield from self._chat(setting, *entered).ask(question)

        return self.model.thread.stream(answers, setting_of_model)

    def _served_answers(self, question: str) -> Generator[Answer]:
        """Yield the growing answer of the served model, which needs no turn of this one."""
        assert self.model.served is not None
        before = [(turn.question, turn.answer.text) for turn in self.turns[SERVED] if turn.answer is not None]
        max_new = self.model.max_new_tokens
        yield from self.model.served.ask(self.open_picture(), before, question, max_new=max_new)

    def ask(self, setting: str, question: str) -> Generator[Turn]:
        """Ask a question, and yield the turn as its answer grows.

        A question that can't be asked yields one turn with the reason.
        """
        turns = self.turns[setting]
        is_served = setting == SERVED
        answers = self._served_answers(question) if is_served else self._answers(setting, question)
        turns.append(Turn(question, None))

        # The page shows `turns`, so each longer answer replaces the last one.
        try:
            with closing(answers) as growing:
                for answer in growing:
                    turns[-1] = Turn(question, answer)
                    yield turns[-1]
        except UserError as error:
            # E.g. the conversation got too long. The page goes on for all others.
            turns[-1] = Turn(question, None, refusal=str(error))
            yield turns[-1]
        except torch.OutOfMemoryError:
            # What others keep for later may be what is missing now.
            self.model.close_others(self)
            turns[-1] = Turn(question, None, refusal=OUT_OF_MEMORY)
            yield turns[-1]
