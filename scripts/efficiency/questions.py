"""The questions that are asked: the run's held-out questions, or questions about noise."""

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
    """A file, which is opened each time the question is asked; or a picture of noise."""

    def image(self) -> Image.Image:
        """The picture."""
        return open_picture(self.picture) if isinstance(self.picture, Path) else self.picture


def held_out_pictures(run: Path, limit: int) -> list[PrefillQuestion]:
    """The first question of each of the first held-out conversations with a picture.

    Raises:
        UserError: the data of the run is gone.
    """
    questions = []
    for conversation, picture in with_pictures(run)[:limit]:
        text, _ = conversation.turns[0]
        questions.append(PrefillQuestion(text.replace(IMAGE, "").strip(), picture))

    return questions


def made_up_questions(family: Family, limit: int) -> list[PrefillQuestion]:
    """Questions about noise, in a square that a model with tiles cuts into several."""
    side = 2 * family.tile_side
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)

    questions = []
    for number in range(1, limit + 1):
        text = f"What do you see in picture {number}?"
        questions.append(PrefillQuestion(text, Image.fromarray(pixels)))

    return questions


def prompts(processor: Any, questions: Sequence[PrefillQuestion]) -> list[str]:
    """The questions in the model's chat template.

    Without one, a question follows its placeholder.
    """
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
