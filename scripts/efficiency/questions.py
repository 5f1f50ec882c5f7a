"""Questions of an efficiency report: the run's held-out questions, or questions about noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.common.held_out import with_pictures
from vzip.families import Family
from vzip.pictures import open_picture
from vzip.templates.encode import IMAGE


@dataclass(frozen=True)
class PrefillQuestion:
    """A picture and a question about it."""

    text: str
    picture: Path | Image.Image
    """A file, which is opened each time the question is asked, or a picture of noise."""

    def image(self) -> Image.Image:
        """Open the picture, if it is a file."""
        return open_picture(self.picture) if isinstance(self.picture, Path) else self.picture


def held_out_pictures(run: Path, limit: int) -> list[PrefillQuestion]:
    """Return the first question of each held-out conversation with a picture, at most `limit`.

    Raises:
        UserError: the data of the run is gone.
    """
    # The first question alone: a later one would need the answers before it.
    questions = []
    for conversation, picture in with_pictures(run)[:limit]:
        text, _ = conversation.turns[0]
        questions.append(PrefillQuestion(text.replace(IMAGE, "").strip(), picture))

    return questions


def made_up_questions(family: Family, limit: int) -> list[PrefillQuestion]:
    """Make questions about noise, in a square that a model with tiles cuts into several."""
    # The seed is fixed, so that two commands measure the same pixels.
    side = 2 * family.tile_side
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)

    questions = []
    for number in range(1, limit + 1):
        text = f"What do you see in picture {number}?"
        questions.append(PrefillQuestion(text, Image.fromarray(pixels)))

    return questions


def prompts(processor: Any, questions: Sequence[PrefillQuestion]) -> list[str]:
    """Put the questions into the model's chat template.

    Without a template, the question follows its placeholder.
    """
    # The answers do not matter here, so a base model without a template can be measured too.
    if not processor.chat_template:
        return [f"{processor.image_token}\n{question.text}" for question in questions]

    texts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        conversation = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=True,
        )
        texts.append(text)

    return texts
