"""Examples become micro batches, padded or packed, with what the model's own processor makes of their
files.
"""

import pickle
import shutil

import pytest
import torch

import vzip
from data.batches.collate import Collator, Packer
from data.examples.tokens import Example, Examples
from tests.helpers import tiny
from tests.helpers.conversations import conversation
from tests.helpers.examples import (
    IMAGE_ID,
    IMAGE_TEXTS,
    NUM_FRAMES,
    NUM_LABELS,
    VIDEO_ID,
    VIDEO_TEXTS,
    collate,
    examples_of,
    process,
    shared_family,
    tensors_of,
    texts_of,
    tokenize,
    without_padding,
)
from tests.helpers.strategies import example_with_pictures, ready_collator
from vzip import UserError
from vzip.families import family_of
from vzip.media import NUM_TILES, MediaInputs
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED, chatml, encode, vicuna

PROCESSOR = tiny.processor()
REDUCER = VisionZip(dominant=4, contextual=2)


# Padded micro batches


def test_without_a_pad_token_the_end_token_pads():
    processor = tiny.processor()
    processor.tokenizer.pad_token = None
    two = [Example([7, 8], [7, 8], {}), Example([7], [7], {})]
    batch = Collator(processor, shared_family(), Identity())(two)
    assert batch.input_ids.tolist() == [[7, 8], [7, tiny.SPECIAL.index("</s>")]]


BATCHES = {
    "several and none": IMAGE_TEXTS,
    "several in one example": ["<image><image><image>example"],
    "videos and pictures": VIDEO_TEXTS,
    "videos alone": ["<video>one", "text", "<video><video>two"],
    "all": IMAGE_TEXTS + VIDEO_TEXTS,
    "text alone": ["no picture", "and none"],
}
CASES = [
    (kind, name)
    for kind in tiny.KINDS
    for name, texts in BATCHES.items()
    if kind in tiny.VIDEO or not any("<video>" in text for text in texts)
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_micro_batch_is_what_the_models_reduced_processor_makes(tmp_path, kind, name):
    family = shared_family(kind)
    examples = examples_of([tiny.marked(kind, text) for text in BATCHES[name]], tmp_path)
    for side in ("right", "left"):
        batch = collate(kind, examples, REDUCER, left=side == "left")
        with vzip.attach(family.model, reducer=REDUCER) as handle:
            processor = handle.processor(tiny.processor(kind))
            expected = process(processor, BATCHES[name], examples, side=side)

        assert torch.equal(batch.input_ids, expected["input_ids"])
        assert torch.equal(batch.attention_mask, expected["attention_mask"])
        for medium, inputs in batch.media.items():
            is_placeholder = expected["input_ids"] == family.placeholder_id(medium)
            assert batch.num_placeholders[medium] == is_placeholder.sum()
            if is_placeholder.any():
                assert_equal_inputs(inputs, MediaInputs.from_processed(medium, expected))

        for row, example in enumerate(examples):
            labels = batch.labels[row][batch.attention_mask[row].bool()]
            assert labels[-NUM_LABELS:].tolist() == example.ids[-NUM_LABELS:]
            assert (batch.labels[row] != IGNORED).sum() == NUM_LABELS


def assert_equal_inputs(inputs, expected):
    """`inputs`, with uint8 pixels, become what the processor makes, to the bit."""
    assert inputs.pixels.dtype == torch.uint8
    pixels = inputs.normalized(torch.float32).pixels
    assert torch.equal(without_padding(pixels, expected.pixels), expected.pixels)
    assert inputs.pixel_name == expected.pixel_name
    # The processor has used up the numbers of tiles, which no model takes.
    assert inputs.extra.keys() - {NUM_TILES} == expected.extra.keys()
    assert all(torch.equal(inputs.extra[name], value) for name, value in expected.extra.items())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_lengths_are_known_before_the_media_are_loaded(tmp_path, kind):
    family = shared_family(kind)
    examples = examples_of([*texts_of(kind), "<image>\nfifth"], tmp_path)
    for reducer in (Identity(), Random(budget=5), VisionZip(dominant=3, contextual=4, keep_cls=False)):
        batch = collate(kind, examples, reducer)
        assert list(batch.media) == (["image", "video"] if kind in tiny.VIDEO else ["image"])

        counting = Collator(tiny.processor(kind), family, reducer, kinds=family.kinds, num_frames=NUM_FRAMES)
        lengths = counting.lengths(examples).tolist()
        if kind in tiny.NATIVE and isinstance(reducer, Identity):
            # The sizes of frames are not recorded, so the videos at the end count as usual ones.
            lengths = [*lengths[:4], *batch.attention_mask.sum(dim=1).tolist()[4:7], *lengths[7:]]
        assert lengths == batch.attention_mask.sum(dim=1).tolist()


def test_an_image_of_unknown_size_counts_as_a_usual_one():
    collator = Collator(tiny.processor("next"), shared_family("next"), Identity())
    examples = Examples.of([Example([IMAGE_ID, 7], [IGNORED, 7], {"image": ("a.png",)})])
    num_tokens = shared_family("next").num_image_tokens(Identity())
    assert collator.lengths(examples).tolist() == [1 + num_tokens]


def test_a_kind_of_media_that_the_model_does_not_take_is_refused():
    with pytest.raises(UserError, match="holds videos, which a 'llava' model does not take"):
        Collator(PROCESSOR, shared_family(), Identity(), kinds=("image", "video"))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_collator_is_light_enough_for_workers_that_get_a_copy(kind):
    family = family_of(tiny.llava(kind))
    collator = Collator(tiny.processor(kind), family, REDUCER)
    num_bytes = sum(parameter.nbytes for parameter in family.model.parameters())
    assert len(pickle.dumps(collator.family)) < num_bytes / 10
    assert collator.family.num_image_tokens(REDUCER, (40, 90)) == family.num_image_tokens(REDUCER, (40, 90))


# Cut conversations


@pytest.mark.parametrize("template", [vicuna(), chatml("be kind")], ids=lambda template: template.name)
def test_a_cut_example_has_as_many_placeholders_as_images_and_videos(tmp_path, template):
    # An image without its placeholder makes the model refuse the batch in the middle of a run. The
    # number of images matters too: LLaVA-OneVision cuts only an image that is alone into tiles.
    source = conversation(
        "<image>\nwhat?", "a cat", "and <image><video>?", "a dog", image=["1.jpg", "2.jpg"], video="1.mp4"
    )
    length = len(encode(template, PROCESSOR.tokenizer, source.turns)[0])
    seen = set()
    for max_tokens in range(1, length + 1):
        for example in tokenize([source], template, tmp_path, max_tokens=max_tokens):
            images = example.media.get("image", ())
            videos = example.media.get("video", ())
            assert len(images) == len(example.sizes) == example.ids.count(IMAGE_ID)
            assert len(videos) == example.ids.count(VIDEO_ID)
            assert all(path.parent == tmp_path for path in images + videos)
            seen.add(tuple(path.name for path in images + videos))

    # The first ones are kept.
    assert seen == {("1.jpg",), ("1.jpg", "2.jpg"), ("1.jpg", "2.jpg", "1.mp4")}


# Files that break after they were looked at


BREAKS = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "no picture": lambda file: file.write_bytes(b"no picture"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
}


@pytest.mark.parametrize("damage", BREAKS)
@pytest.mark.parametrize("text", ["<image>one", "<video>one"])
def test_a_picture_or_video_that_vanishes_or_breaks_is_named(tmp_path, text, damage):
    examples = examples_of([text], tmp_path)
    ((path,),) = examples[0].media.values()
    for file in list(path.iterdir()) if path.is_dir() else [path]:
        BREAKS[damage](file)
    with pytest.raises(UserError, match=path.name):
        collate("video", examples, REDUCER)
    if path.is_dir():
        shutil.rmtree(path)
        with pytest.raises(UserError, match=path.name):
            collate("video", examples, REDUCER)


# On the way to the device


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_tensors_of_a_micro_batch_go_to_the_device(tmp_path, kind):
    padded = collate(kind, examples_of(texts_of(kind), tmp_path), REDUCER)
    example = example_with_pictures([1, IMAGE_ID, 6], [IGNORED, IGNORED, 6])
    packed = Packer(ready_collator(), num_prefix=0)([example])
    for batch in (padded, packed):
        on_device = batch.to(torch.device("meta"))
        assert {tensor.device.type for tensor in tensors_of(on_device)} == {"meta"}
        assert len(tensors_of(on_device)) == len(tensors_of(batch)) >= 3 + len(batch.media)
    assert (on_device.lengths, on_device.num_examples) == ((3,), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_pixels_are_the_same_bits(tmp_path):
    batch = collate("next", examples_of(IMAGE_TEXTS, tmp_path), Identity()).pin_memory()
    assert all(tensor.is_pinned() for tensor in tensors_of(batch))
    on_device = batch.to(torch.device("cuda")).media["image"].normalized(torch.float32)
    assert torch.equal(on_device.pixels.cpu(), batch.media["image"].normalized(torch.float32).pixels)
