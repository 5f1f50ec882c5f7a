"""Examples with images and videos on disk, and what a processor makes of the same texts and files."""

from functools import cache

import torch

from data.batches.collate import Collator
from data.batches.dataset import BatchPlan, MicroBatches, PaddedBatcher, has_media
from data.examples.tokens import Example, Examples, write_tokens
from tests.helpers import tiny
from vzip.families import family_of
from vzip.families.features import VisualFeatures
from vzip.pictures import open_picture
from vzip.templates.encode import IGNORED
from vzip.videos import read_frames

SIZES = [(tiny.SIDE, tiny.SIDE), (40, 90), (150, 60), (20, 200)]
"""(height, width) of the pictures, in turns; of the frames of a video too."""
NUM_FRAMES = 3
"""Frames that are taken of a video."""
NUM_LABELS = 3
"""Label tokens of each example, its last ones."""
IMAGE_TEXTS = ["<image>one", "no picture", "a <image> and <image> there", "<image>\nanother"]
VIDEO_TEXTS = ["<video>a clip", "<image>with<video> here", "<video><video>two"]
IMAGE_ID = tiny.SPECIAL.index("<image>")
VIDEO_ID = tiny.SPECIAL.index("<video>")
PAD_ID = tiny.SPECIAL.index("<unk>")


@cache
def shared_family(kind="clip"):
    """The family of a tiny model. Tests share it, and must not change it."""
    return family_of(tiny.llava(kind))


def texts_of(kind):
    """Texts with all that a model of a kind in `tiny.KINDS` takes."""
    return IMAGE_TEXTS + (VIDEO_TEXTS if kind in tiny.VIDEO else [])


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
    examples = []
    num_images = num_videos = 0
    for index, text in enumerate(texts):
        ids = tiny.tokenizer()(text)["input_ids"]
        labels = [*[IGNORED] * (len(ids) - NUM_LABELS), *ids[-NUM_LABELS:]]

        images = range(num_images, num_images + text.count("<image>"))
        videos = range(num_videos, num_videos + text.count("<video>"))
        num_images, num_videos = images.stop, videos.stop
        media = {
            "image": tuple(save_picture(folder, number) for number in images),
            "video": tuple(save_video(folder, number) for number in videos),
        }

        present = {kind: paths for kind, paths in media.items() if paths}
        sizes = tuple(SIZES[number % len(SIZES)] for number in images)
        examples.append(Example(ids, labels, present, sizes=sizes, index=index))
    return Examples.of(examples)


def tokenize(conversations, template, folder, *, max_tokens=2048, sizes=None):
    """The conversations as `Examples` in a file, with images in `folder`, by default all of the size
    of a tile.
    """
    if sizes is None:
        sizes = {path: (tiny.SIDE, tiny.SIDE) for source in conversations for path in source.images}
    target = folder / "tokens.arrow"
    write_tokens(conversations, template, tiny.tokenizer(), target, max_tokens=max_tokens, sizes=sizes)
    return Examples.open(target, folder)


def padded_batches(examples, collator, *, micro, num_steps, accumulation=1, world_size=1, seed=0, rank=0):
    """A rank's padded micro batches."""
    size = micro * accumulation * world_size
    plan = BatchPlan(size=size, world_size=world_size, num_steps=num_steps, seed=seed)
    batcher = PaddedBatcher(collator, examples, plan, micro=micro)
    return MicroBatches(batcher, plan, rank=rank, has_gradient=has_media(examples))


def micro_batches_of(batches, step):
    """The micro batches of a step."""
    first = batches.first_index(step)
    return [batches[first + number] for number in range(batches.num_micro_batches(step))]


def collate(kind, examples, reducer, *, kinds=None, left=False):
    """The padded micro batch of a model of a kind in `tiny.KINDS`."""
    collator = Collator(
        tiny.processor(kind),
        shared_family(kind),
        reducer,
        kinds=kinds or examples.kinds,
        num_frames=NUM_FRAMES,
    )
    return collator(examples, left=left)


class ReadyMedia:
    """Media that are features already: each token of an image is the number of its example."""

    def __init__(self, num_tokens=2):
        self.num_tokens = num_tokens

    def load(self, kind, examples):
        numbers = [float(example.index) for example in examples for _ in example.media.get(kind, ())]
        tokens = torch.tensor(numbers).repeat_interleave(self.num_tokens)[:, None]
        return VisualFeatures.in_order(tokens, num_media=len(numbers))

    def blank(self, kind):
        return VisualFeatures.in_order(torch.zeros(self.num_tokens, 1), num_media=1)

    def counts(self, kind, inputs):
        return inputs.counts.tolist()


def process(processor, texts, examples, *, side="right"):
    """What a processor makes of the texts with the pictures and videos of the examples."""
    images = []
    videos = []
    for example in examples:
        if "image" in example.media:
            images.append([open_picture(path) for path in example.media["image"]])
        videos += [read_frames(path, NUM_FRAMES) for path in example.media.get("video", ())]

    media = {name: values for name, values in (("images", images), ("videos", videos)) if values}
    return processor(text=list(texts), padding=True, padding_side=side, return_tensors="pt", **media)


def without_padding(pixels, expected):
    """`pixels` with zeros where `expected` has tiles of zeros. They pad images of few tiles, and no
    model looks at them.
    """
    if pixels.shape != expected.shape or expected.dim() != 5:
        return pixels
    is_padding = ~expected.flatten(2).any(dim=2)
    return pixels.masked_fill(is_padding[..., None, None, None], 0.0)


def tensors_of(batch):
    """All tensors of a micro batch, in a fixed order."""
    tensors = []
    batch.map(lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def are_equal(one, other):
    """Whether two micro batches are equal to the bit."""
    first, second = tensors_of(one), tensors_of(other)
    if one.num_placeholders != other.num_placeholders or len(first) != len(second):
        return False
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
