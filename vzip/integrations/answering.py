"""Answers to batches of conversations, in the form that evaluation harnesses ask for.

A conversation is a list of messages `{"role", "content": [{"type": "text", "text"}, {"type":
"image" or "video", "url"}]}`, the question last. An image's "url" is a picture or the path of one.
A video's is the path of a file, or a list of frames.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from vzip.errors import UserError
from vzip.generate import end_ids, generate_answers
from vzip.pictures import check_size, open_picture, upright_rgb
from vzip.runs.compare import Comparison
from vzip.videos import read_frames

FULL = "full"
DTYPES = ("bfloat16", "float16", "float32")

MAX_NEW_TOKENS = 1024
"""Most tokens of an answer whose question sets no limit, as in lmms-eval's own LLaVA."""

Messages = list[dict[str, Any]]
"""One conversation; the module's docstring has its form."""


def _whole_number(name: str, value: Any) -> int:
    """Read a whole number from a command line. Raises UserError for anything else, and below 1."""
    # int() alone would also take " 7 ", "1_000" and numbers below 0.
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={value} must be a whole number, at least 1")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Which model answers, in which setting of the results table, and how it runs."""

    pretrained: str
    """A run folder, or the folder or hub id of an export or of a base model."""
    row: str | None = None
    """"full", "free" (training-free) or "tuned"; by default the last one that the model has."""
    budget: int | str | None = None
    """Visual tokens; by default the run's first budget. "full" keeps all, as `row="full"` does."""
    base: str | None = None
    """Where a run's base model is now, if it has moved since the run."""
    dtype: str | None = None
    """Precision of the frozen weights; by default the run's, or bfloat16 for a base model."""
    device: str | None = None
    """By default a GPU if there is one."""
    batch_size: int = 1
    """Questions per batch."""
    num_frames: int = 8
    """Frames taken from a video file, evenly spread."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Read the settings from the arguments of a command line.

        Raises:
            UserError: a setting is unknown, missing, or out of its range.
        """
        # A mistyped setting must not be ignored: the scores would be those of another setting.
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            name = unknown[0]
            raise UserError(
                f"{name}={arguments[name]} is not a setting of vzip; choose from: {', '.join(known)}"
            )
        if not arguments.get("pretrained"):
            raise UserError(
                "pretrained=... is missing: give a run folder, or the folder or hub id of a base model"
            )

        # A command line gives numbers as text.
        values = dict(arguments)
        for name in ("batch_size", "num_frames", "budget"):
            if values.get(name) not in (None, FULL):
                values[name] = _whole_number(name, values[name])

        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        """Raise UserError for an unknown dtype, or for two settings that exclude each other."""
        # Refuse a wrong value here, before a large model is loaded for minutes.
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype} must be one of: {', '.join(DTYPES)}")

        # The setting "full" keeps all tokens. Its budget is "full", which no other setting has.
        both_given = self.row is not None and self.budget is not None
        if both_given and (self.row == FULL) != (self.budget == FULL):
            raise UserError(
                f"row={self.row} and budget={self.budget} contradict each other; give one of them"
            )


@contextmanager
def _explain_media(medium: Any) -> Iterator[None]:
    """Turn an error about a picture or a video into UserError, which names it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        name = medium if isinstance(medium, str) else "a picture of the task"
        raise UserError(f"{name} can't be shown to the model: {error}; take it out of the task") from error


def _picture(image: Any) -> Any:
    """Open a picture, given as such or as a path, as upright RGB, as in training.

    Raises UserError if it can't be read, or exceeds the limits of `vzip.pictures`.
    """
    with _explain_media(image):
        return open_picture(Path(image)) if isinstance(image, str) else upright_rgb(image)


def _frames(video: Any, num_frames: int) -> Any:
    """Read the frames of a video file, as in training. A list of frames is returned unchanged.

    Raises UserError if they can't be read, or exceed the limits of `vzip.pictures`.
    """
    if isinstance(video, Mapping):
        raise UserError(
            f"a video with {', '.join(sorted(video))}: parts of videos are not supported; "
            "give the path of a file"
        )
    with _explain_media(video):
        if isinstance(video, str):
            return read_frames(Path(video), num_frames)

        # Other frames are arrays, which the processor checks.
        for frame in video if isinstance(video, list | tuple) else ():
            if isinstance(frame, Image.Image):
                check_size(*frame.size)
    return video


def _generation_arguments(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Translate what a harness asks for into arguments of `generate`.

    Decoding is greedy unless a temperature is given. Arguments that are meant for other models are
    ignored.
    """
    # Tasks give a temperature of 0, or do_sample=False beside one, for greedy decoding.
    temperature = float(asked.get("temperature") or 0)
    is_sampled = bool(asked.get("do_sample", True)) and temperature > 0
    return {
        "max_new_tokens": int(asked.get("max_new_tokens") or MAX_NEW_TOKENS),
        "num_beams": int(asked.get("num_beams") or 1),
        "do_sample": is_sampled,
        "temperature": temperature if is_sampled else None,
        "top_p": asked.get("top_p") if is_sampled else None,
        # transformers samples from the 50 most likely tokens unless told otherwise.
        "top_k": None,
    }


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Cut the text before the first of the strings `until`, and strip white space around it."""
    ends = [until] if isinstance(until, str) else until or []
    for end in ends:
        if end:
            text = text.split(end)[0]
    return text.strip()


def _media_parts(conversation: Messages) -> Iterator[dict[str, Any]]:
    """Yield the parts of a conversation that are not text."""
    for message in conversation:
        for part in message["content"]:
            if part["type"] != "text":
                yield part


@dataclass(frozen=True)
class Generated:
    """A generated answer, and how many tokens it took."""

    text: str
    num_prompt_tokens: int
    """Tokens of the prompt, visual ones included."""
    num_tokens: int
    """Tokens of the answer, its end token included."""


class Answerer:
    """A model that answers in one of its settings.

    Attributes:
        settings: the settings that it was made with.
        comparison: the model in all of its settings.
        device: the model's device.
        processor: the processor of the current setting.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        """Load the model. Raises UserError as `Comparison.open` and `switch_to` do."""
        self.settings = settings
        self.comparison = Comparison.open(
            settings.pretrained,
            base=settings.base,
            dtype=getattr(torch, settings.dtype) if settings.dtype else None,
            device=settings.device,
        )
        if self.comparison.processor.chat_template is None:
            raise UserError(
                f"pretrained={settings.pretrained} has no chat template, so its prompt format is "
                "unknown; give a run, or a model whose processor has a chat template"
            )
        self.device: torch.device = self.comparison.family.model.device

        # Holds the block of the current setting open, until another one is chosen.
        self._current = ExitStack()
        if settings.budget == FULL:
            self.switch_to(FULL)
        else:
            budget = None if settings.budget is None else int(settings.budget)
            self.switch_to(settings.row or self.comparison.rows[-1], budget=budget)

    def switch_to(self, row: str, *, budget: int | None = None) -> None:
        """Switch to another setting. Raises UserError if the model lacks it, or the budget."""
        # Check first: a setting that fails must not leave the model without any.
        self.comparison.reducer(row, budget=budget)
        self._current.close()
        model, self.processor = self._current.enter_context(self.comparison.row(row, budget=budget))
        self._ends = end_ids(model, self.processor)

    def prompt(self, conversation: Messages) -> str:
        """The text that the model of the current setting gets for a conversation."""
        text: str = self.processor.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return text

    def _media(self, conversations: Sequence[Messages]) -> dict[str, list[Any]]:
        """Read the media: `images`, one list for each conversation that has any, and `videos`.

        Raises:
            UserError: the model does not take one of the kinds.
        """
        family = self.comparison.family
        images: list[list[Any]] = []
        videos: list[Any] = []
        for conversation in conversations:
            own_images = []
            for part in _media_parts(conversation):
                if part["type"] not in family.kinds:
                    raise UserError(
                        f"a question holds a part of type {part['type']!r}, "
                        f"which a {family.model_type!r} model does not take"
                    )

                # Processors want images by conversation, and videos in one list.
                if part["type"] == "image":
                    own_images.append(_picture(part["url"]))
                else:
                    videos.append(_frames(part["url"], self.settings.num_frames))
            if own_images:
                images.append(own_images)

        # Processors fail on empty lists, so a kind that is absent is left out.
        media = {"images": images, "videos": videos}
        return {name: items for name, items in media.items() if items}

    @torch.inference_mode()
    def answers(self, conversations: Sequence[Messages], asked: Mapping[str, Any]) -> list[Generated]:
        """Answer one batch of conversations.

        Args:
            conversations: each with its question last, any number of images, and videos if the
                model takes them.
            asked: arguments of a harness: `max_new_tokens`, `temperature`, `top_p`, `num_beams`,
                `do_sample`, and `until`, the strings that end an answer. Others are ignored.

        Raises:
            UserError: the model does not take a kind of media.
        """
        # Prompts are padded on the left, so that all answers begin at the same position.
        model = self.comparison.family.model
        inputs = self.processor(
            text=[self.prompt(conversation) for conversation in conversations],
            **self._media(conversations),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device, model.dtype)
        answers = generate_answers(
            model,
            self.processor.tokenizer,
            inputs,
            ends=self._ends,
            **_generation_arguments(asked),
        )

        # The mask is 1 on the prompt's own tokens, and 0 on padding.
        prompt_lengths = inputs["attention_mask"].sum(dim=1).tolist()
        generated = []
        for answer, prompt_length in zip(answers, prompt_lengths, strict=True):
            # Harnesses compare the cut text, but speed counts every token that was generated.
            text = cut(answer.text, asked.get("until"))
            generated.append(Generated(text, prompt_length, len(answer.token_ids)))
        return generated
