"""Rows of text with pictures and videos on disk: as the collator takes them, and what a processor makes of the same."""

import torch

from data.batches.dataset import BatchPlan, MicroBatches, PaddedBatcher, has_media
from data.examples.tokens import Example, Examples, write_tokens
from tests.helpers import tiny
from vzip.pictures import open_picture
from vzip.templates.encode import IGNORED
from vzip.videos import read_frames

SIZES = [(tiny.SIDE, tiny.SIDE), (40, 90), (150, 60), (20, 200)]
"""(height, width) of the pictures, in turns; of the frames of a video too."""
NUM_FRAMES = 3
NUM_LABELS = 3
"""Label tokens of each row, its last ones."""
IMAGE_ROWS = ["<image>one", "no picture", "a <image> and <image> there", "<image>\nanother"]
VIDEO_ROWS = ["<video>a clip", "<image>with<video> here", "<video><video>two"]


def rows_of(kind):
    """Texts with all that a model of a kind in `tiny.KINDS` takes."""
    return IMAGE_ROWS + (VIDEO_ROWS if kind in tiny.VIDEO else [])


def save_picture(folder, number):
    path = folder / f"{number}.png"
    tiny.picture(number, *SIZES[number % len(SIZES)]).save(path)
    return path


def save_video(folder, number):
    """A folder of 1 to 5 frames: fewer and more than are taken of it."""
    path = folder / f"clip{number}"
    path.mkdir()
    for frame in range(1 + 2 * number % 6):
        tiny.picture(100 * number + frame, *SIZES[number % len(SIZES)]).save(path / f"{frame}.png")
    return path


def examples_of(texts, folder):
    """Examples in memory, one for each text, with a picture or video of its own for each placeholder."""
    examples, numbers = [], {"<image>": 0, "<video>": 0}
    for index, text in enumerate(texts):
        ids = tiny.tokenizer()(text)["input_ids"]
        media, sizes = {}, ()
        for kind, save in (("image", save_picture), ("video", save_video)):
            first = numbers[f"<{kind}>"]
            numbers[f"<{kind}>"] += (count := text.count(f"<{kind}>"))
            if count:
                media[kind] = tuple(save(folder, number) for number in range(first, first + count))
            if kind == "image":
                sizes = tuple(SIZES[number % len(SIZES)] for number in range(first, first + count))
        labels = [*[IGNORED] * (len(ids) - NUM_LABELS), *ids[-NUM_LABELS:]]
        examples.append(Example(ids, labels, media, sizes=sizes, index=index))
    return Examples.of(examples)


def tokenized(rows, template, folder, *, max_tokens=2048, sizes=None):
    """The rows as `Examples` with pictures below `folder`, by default all of the size of a tile."""
    target = folder / "tokens.arrow"
    sizes = sizes or {path: (tiny.SIDE, tiny.SIDE) for row in rows for path in row.images}
    write_tokens(rows, template, tiny.tokenizer(), target, max_tokens=max_tokens, sizes=sizes)
    return Examples.open(target, folder)


def padded(examples, collate, *, micro, num_steps, accumulation=1, world_size=1, seed=0, rank=0):
    """A rank's padded micro batches."""
    plan = BatchPlan(
        size=micro * accumulation * world_size, world_size=world_size, num_steps=num_steps, seed=seed
    )
    return MicroBatches(
        PaddedBatcher(collate, examples, plan, micro=micro), plan, rank=rank, has_gradient=has_media(examples)
    )


class Ready:
    """Media that are features already: a row's number, some tokens an image."""

    def __init__(self, num_tokens=2):
        self.num_tokens = num_tokens

    def load(self, kind, examples):
        rows = [float(example.index) for example in examples for _ in example.media.get(kind, ())]
        return {"features": torch.tensor(rows).repeat_interleave(self.num_tokens)[:, None]}

    def blank(self, kind):
        return {"features": torch.zeros(self.num_tokens, 1)}

    def counts(self, kind, inputs):
        return [self.num_tokens] * (len(inputs["features"]) // self.num_tokens)


def processed(processor, texts, examples, *, side="right"):
    """What a processor makes of the texts with the pictures and videos of the examples."""
    images = [
        [open_picture(path) for path in example.media["image"]]
        for example in examples
        if "image" in example.media
    ]
    videos = [
        read_frames(path, NUM_FRAMES) for example in examples for path in example.media.get("video", ())
    ]
    media = {name: given for name, given in (("images", images), ("videos", videos)) if given}
    return processor(text=list(texts), padding=True, padding_side=side, return_tensors="pt", **media)


def without_padding(inputs, wanted):
    """`inputs` as `wanted` in the tiles that pad a batch of images of several: all 0 there, and no model looks at them."""
    (name, pixels), (_, expected) = next(iter(inputs.items())), next(iter(wanted.items()))
    if pixels.shape != expected.shape or expected.dim() != 5:
        return inputs
    padding = ~expected.flatten(2).any(dim=2)
    return inputs | {name: pixels.masked_fill(padding[..., None, None, None], 0.0)}
