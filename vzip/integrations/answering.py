"""Answers to batches of conversations, as evaluation harnesses ask for them, of one model in one row."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch

from vzip.errors import UserError
from vzip.pictures import open_picture, upright_rgb
from vzip.runs.compare import Comparison
from vzip.templates.jinja import end_ids
from vzip.videos import read_frames

FULL = "full"
DTYPES = ("bfloat16", "float16", "float32")
MAX_NEW_TOKENS = 1024
"""Of an answer whose question sets no limit, as in lmms-eval's own LLaVA."""

Conversation = list[dict[str, Any]]
"""Messages `{"role", "content": [{"type": "text", "text"}, {"type": "image" or "video", "url"}]}`, the question last.
An image's "url" is a picture or its path, a video's the path of a file, or its frames."""


def _whole(name: str, value: Any) -> int:
    """Raises UserError for what is not a whole number of at least 1."""
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={value} must be a whole number, at least 1")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What model, in which row, and how it is run."""

    pretrained: str
    """A run folder; or the folder or hub id of a base model."""
    row: str | None = None
    """"full", "free" or "tuned"; by default the last one that there is."""
    budget: int | str | None = None
    """Visual tokens; by default the run's first; "full" for all, which is the row "full"."""
    base: str | None = None
    """Where a run's base model is now, if not where the run found it."""
    dtype: str | None = None
    """Of the frozen weights; by default as in the run, and bfloat16 of a base model."""
    device: str | None = None
    """By default a GPU if there is one."""
    batch_size: int = 1
    """Questions answered at a time."""
    num_frames: int = 8
    """Frames taken of a video file, at even distances."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Settings as they come from a command line.

        Raises:
            UserError: a setting that is unknown, missing, or out of its range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise UserError(
                f"{unknown[0]}={given[unknown[0]]} is no setting of vzip; there are: {', '.join(known)}"
            )
        if not given.get("pretrained"):
            raise UserError(
                "pretrained=... is missing: a run folder, or the folder or hub id of a base model"
            )
        settings = dict(given)
        for name in ("batch_size", "num_frames", "budget"):
            if settings.get(name) is not None and settings[name] != FULL:
                settings[name] = _whole(name, settings[name])
        if (dtype := settings.get("dtype")) not in (None, *DTYPES):
            raise UserError(f"dtype={dtype} must be one of: {', '.join(DTYPES)}")
        made = cls(**settings)
        if (made.row == FULL) != (made.budget == FULL) and None not in (made.row, made.budget):
            raise UserError(
                f"row={made.row} and budget={made.budget} contradict each other; give one of them"
            )
        return made


def _picture(image: Any) -> Any:
    """A picture, or the file at a path, as upright RGB, as in training."""
    return open_picture(Path(image)) if isinstance(image, str) else upright_rgb(image)


def _frames(video: Any, num_frames: int) -> Any:
    """The frames of a video file, first and last among them, as in training; frames stay as they are."""
    if isinstance(video, Mapping):
        raise UserError(
            f"a video with {', '.join(sorted(video))}: parts of videos can't be shown; give the path of a file"
        )
    if not isinstance(video, str):
        return video

    return read_frames(Path(video), num_frames)


def _generation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`generate`'s arguments of a harness' ones, which may also hold what other models take. Greedy unless asked otherwise."""
    temperature = float(asked.get("temperature") or 0)
    sampled = bool(asked.get("do_sample", True)) and temperature > 0
    return {
        "max_new_tokens": int(asked.get("max_new_tokens") or MAX_NEW_TOKENS),
        "num_beams": int(asked.get("num_beams") or 1),
        "do_sample": sampled,
        "temperature": temperature if sampled else None,
        "top_p": asked.get("top_p") if sampled else None,
        "top_k": None,
    }


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end it, without white space around it."""
    for end in [until] if isinstance(until, str) else until or ():
        text = text.split(end)[0] if end else text
    return text.strip()


@dataclass(frozen=True)
class Generated:
    """A generated answer, and what it took."""

    text: str
    num_prompt_tokens: int
    """The question's, the visual ones among them."""
    num_tokens: int
    """The answer's, its end among them."""


class Answerer:
    """A model that answers in one of its rows.

    Attributes:
        settings: as given.
        comparison: the model in all of its rows.
        device: where it is.
        processor: of the current row.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        """Raises UserError as `Comparison.open` and `take` do."""
        self.settings = settings
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        self.comparison = Comparison.open(
            settings.pretrained, base=settings.base, dtype=dtype, device=settings.device
        )
        if self.comparison.processor.chat_template is None:
            raise UserError(
                f"pretrained={settings.pretrained} has no chat template, so it is not known how to ask; give a run, or a model "
                f"whose processor has one"
            )
        self.device: torch.device = self.comparison.family.model.device
        self._row = ExitStack()
        full = settings.budget == FULL
        row = FULL if full else settings.row or self.comparison.rows[-1]
        self.take(row, budget=None if full or settings.budget is None else int(settings.budget))

    def take(self, row: str, *, budget: int | None = None) -> None:
        """Generated in this row from now on. Raises UserError for a row or a budget that there is not."""
        self.comparison.reducer(row, budget=budget)
        self._row.close()
        model, self.processor = self._row.enter_context(self.comparison.row(row, budget=budget))
        self._ends = sorted(end_ids(model, self.processor))

    def prompt(self, conversation: Conversation) -> str:
        """A conversation as the model of the current row is asked it."""
        text: str = self.processor.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return text

    def _media(self, conversations: Sequence[Conversation]) -> dict[str, list[Any]]:
        """`images`, by conversation, and `videos`, of those that hold any.

        Raises UserError for what the model does not take.
        """
        kinds = self.comparison.family.kinds
        rows: dict[str, list[list[Any]]] = {"image": [], "video": []}
        for conversation in conversations:
            parts = [
                part for message in conversation for part in message["content"] if part["type"] != "text"
            ]
            for part in parts:
                if part["type"] not in kinds:
                    model = self.comparison.family.model_type
                    raise UserError(
                        f"a question holds a part of type {part['type']!r}, which a {model!r} model does not take"
                    )
            images = [part["url"] for part in parts if part["type"] == "image"]
            rows["image"].append([_picture(image) for image in images])
            rows["video"].append(
                [_frames(part["url"], self.settings.num_frames) for part in parts if part["type"] == "video"]
            )
        images, videos = (
            [row for row in rows["image"] if row],
            [*chain(*rows["video"])],
        )
        return {name: media for name, media in (("images", images), ("videos", videos)) if media}

    @torch.inference_mode()
    def answers(self, conversations: Sequence[Conversation], asked: Mapping[str, Any]) -> list[Generated]:
        """Answers to one batch.

        Args:
            conversations: each with its question last, and any number of images and, where the model takes them, videos.
            asked: of a harness: `max_new_tokens`, `temperature`, `top_p`, `num_beams`, `do_sample`, and `until`, strings that
                end an answer. Others are other models', and not looked at.

        Raises:
            UserError: a kind of media that the model does not take.
        """
        model, tokenizer = self.comparison.family.model, self.processor.tokenizer
        prompts = [self.prompt(conversation) for conversation in conversations]
        media = self._media(conversations)
        inputs = self.processor(text=prompts, **media, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.device, model.dtype)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        output = model.generate(**inputs, **_generation(asked), eos_token_id=self._ends, pad_token_id=pad)
        made = output[:, inputs["input_ids"].shape[1] :]
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        counts = _lengths(made, self._ends)
        return [
            Generated(cut(text, asked.get("until")), length, count)
            for text, length, count in zip(texts, lengths, counts, strict=True)
        ]


def _lengths(made: torch.Tensor, ends: Sequence[int]) -> list[int]:
    """Tokens of each generated row up to its end, which padding may follow."""
    is_end = torch.isin(made, torch.tensor(ends, device=made.device))
    after = is_end.int().cumsum(dim=1) - is_end.int()
    counts: list[int] = (after == 0).sum(dim=1).tolist()
    return counts
