"""Videos: every frame is reduced by itself, in models, processors, generation and training alike."""

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

import vzip
from tests.helpers import tiny
from tests.helpers.models import GREEDY, digests, logits, train_projector
from vzip import UserError
from vzip.families import families
from vzip.media import FrameProcessor
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip

pytestmark = pytest.mark.slow

EXAMPLES = [  # (text, sizes of pictures, seeds of videos)
    ("<video>a", [], [0]),
    ("<image>b<video>cd", [(40, 90)], [1]),
    ("only text", [], []),
]


# Models for media of any size reduce pairs of frames, and are held in test_kept_positions.py.
@pytest.fixture(params=[kind for kind in tiny.VIDEO if kind not in tiny.NATIVE])
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny.llava(kind, layers=3)


@pytest.fixture
def processor(kind):
    return tiny.processor(kind)


def batch(processor, examples=EXAMPLES, side="right", num_frames=3, first_picture=0):
    """Padded examples as the processor returns them. A picture's number is that of its example."""
    pictures, videos, texts = [], [], []
    for number, (text, sizes, seeds) in enumerate(examples, start=first_picture):
        texts.append(text)
        if sizes:
            pictures.append([tiny.picture(number, *size) for size in sizes])
        videos += [tiny.video(seed, num_frames) for seed in seeds]
    return processor(
        images=pictures or None,
        videos=videos or None,
        text=texts,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )


@torch.no_grad()
def frame_features(model, pixel_values_videos, num_tokens):
    """float[videos, frames, T, d_llm], and OneVision's newlines float[videos, 1, d_llm]; Video-LLaVA
    has none.
    """
    tokens = model.model.get_video_features(pixel_values_videos=pixel_values_videos).pooler_output
    num_videos, num_frames = pixel_values_videos.shape[:2]
    tokens = tokens.reshape(num_videos, -1, tokens.shape[-1])
    frames = tokens[:, : num_frames * num_tokens]
    return frames.view(num_videos, num_frames, num_tokens, -1), tokens[:, num_frames * num_tokens :]


# ---- The identity reducer, and detaching ----


def test_identity_is_the_plain_model_bit_for_bit(model, processor):
    inputs = batch(processor)
    plain = logits(model, inputs)
    with vzip.attach(model, reducer=Identity()) as handle:
        same_inputs = batch(handle.processor(processor))
        assert all(torch.equal(same_inputs[name], inputs[name]) for name in inputs)
        assert torch.equal(logits(model, same_inputs), plain)
        for num_frames in (1, 2, 5):
            ids = batch(processor, EXAMPLES[:1], num_frames=num_frames)["input_ids"]
            assert (ids == model.config.video_token_id).sum() == handle.num_video_tokens(num_frames)


# ---- How many tokens ----


@pytest.mark.parametrize(
    ("settings", "num_tokens"),
    [
        ({"budget": 6}, 6),
        ({"dominant": 3, "contextual": 4}, 7),
        ({"dominant": 0, "contextual": 4}, 4),
        ({"budget": 6, "anyres": "spatial"}, 6),
        ({"reducer": Random(budget=5)}, 5),
        ({"reducer": Random(budget=5), "anyres": "spatial"}, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_frames", [1, 3, 4])
def test_handle_processor_and_model_agree_on_the_number_of_tokens(
    kind, model, processor, num_frames, settings, num_tokens
):
    newline = int(kind == "onevision")
    with vzip.attach(model, **settings) as handle:
        count = handle.num_video_tokens(num_frames)
        assert count == num_frames * num_tokens + newline
        inputs = batch(handle.processor(processor), num_frames=num_frames)
        placeholders = (inputs["input_ids"] == model.config.video_token_id).sum(dim=1)
        assert placeholders.tolist() == [count, count, 0]
        images = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1)
        assert images.tolist() == [0, handle.num_image_tokens((40, 90)), 0]
        assert inputs["pixel_values_videos"].shape == (2, num_frames, 3, tiny.SIDE, tiny.SIDE)
        features = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        assert features.shape[:-1].numel() == 2 * count
        assert logits(model, inputs).isfinite().all()
        if kind == "onevision":  # Video-LLaVA's processor has no such method
            sizes = [(num_frames, 90, 40)]
            counted = handle.processor(processor)._get_num_multimodal_tokens(video_sizes=sizes)
            assert counted.num_video_tokens == [count]


# ---- Every frame by itself ----


@pytest.mark.parametrize("anyres", ["released", "spatial"])
def test_a_frame_is_reduced_the_same_in_every_video(kind, model, processor, anyres):
    frames = tiny.video(0, 5)
    numbers = [[0, 1, 2], [3, 1, 4], [2, 0, 0]]
    videos = [[frames[number] for number in video] for video in numbers]
    pixels = processor.video_processor(videos)["pixel_values_videos"]
    with vzip.attach(model, dominant=4, contextual=2, anyres=anyres):
        together, newlines = frame_features(model, pixels, 6)
        for video in range(3):
            alone, _ = frame_features(model, pixels[video : video + 1], 6)
            torch.testing.assert_close(alone[0], together[video], rtol=1e-5, atol=1e-6)
    assert newlines.shape[1] == int(kind == "onevision")
    assert all(torch.equal(newline, model.model.image_newline) for newline in newlines.flatten(0, 1))

    by_number = {}
    for number, tokens in zip(chain(*numbers), together.flatten(0, 1), strict=True):
        torch.testing.assert_close(by_number.setdefault(number, tokens), tokens, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(by_number[0], by_number[1], atol=1e-2)


def test_a_frame_is_reduced_like_a_picture(model, processor):
    pixels = processor.video_processor([tiny.video(0)])["pixel_values_videos"]
    if hasattr(model.model, "video_tower"):
        # Video-LLaVA sees videos with a tower of their own.
        model.model.video_tower.load_state_dict(model.model.image_tower.state_dict())
    with vzip.attach(model, dominant=4, contextual=2) as handle, torch.no_grad():
        (frames,), _ = frame_features(model, pixels, 6)
        pictures = handle.family.projector(tiny.reduce(handle, pixels[0]).features)
    torch.testing.assert_close(frames, pictures, rtol=1e-5, atol=1e-6)


def test_video_llava_reads_videos_with_its_video_tower():
    model = tiny.llava("video", layers=3)
    pixels = tiny.processor("video").video_processor([tiny.video(0)])["pixel_values_videos"]
    with vzip.attach(model, dominant=4, contextual=2), torch.no_grad():
        frames, _ = frame_features(model, pixels, 6)
        pictures = model.model.get_image_features(pixels[0]).pooler_output
        for parameter in model.model.video_tower.parameters():
            parameter.mul_(-1)
        assert not torch.equal(frame_features(model, pixels, 6)[0], frames)
        assert torch.equal(model.model.get_image_features(pixels[0]).pooler_output, pictures)


def test_a_batch_is_its_examples_one_by_one(model, processor):
    with vzip.attach(model, budget=6) as handle:
        reduced = handle.processor(processor)
        inputs = batch(reduced)
        together = logits(model, inputs)
        for row, one in enumerate(EXAMPLES):
            alone = batch(reduced, [one], first_picture=row)
            mask = inputs["attention_mask"][row].bool()
            assert torch.equal(alone["input_ids"][0], inputs["input_ids"][row, mask])
            torch.testing.assert_close(logits(model, alone)[0], together[row, mask], rtol=1e-4, atol=1e-5)


# ---- Generation and training ----


def test_generation_of_a_batch_is_that_of_its_examples(model, processor):
    examples = [("<image>a<video>bcdef", [(40, 90)], [0]), ("g<video>", [], [1])]
    with vzip.attach(model, budget=6) as handle:
        reduced = handle.processor(processor)
        inputs = batch(reduced, examples, side="left")
        assert inputs["attention_mask"][1, 0] == 0
        length = inputs["input_ids"].shape[1]
        together = model.generate(**inputs, **GREEDY)
        for one, answer in zip(examples, together[:, length:], strict=True):
            alone = batch(reduced, [one])
            assert torch.equal(model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :], answer)
        # A broken model would repeat a single token.
        assert len(set(together[:, length:].flatten().tolist())) > 2

        # What a collator gives the model has the same effect.
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        arguments |= tiny.media_arguments("image", inputs) | tiny.media_arguments("video", inputs)
        assert torch.equal(model.generate(**arguments, **GREEDY), together)


def test_training_on_videos_changes_the_projector_alone(model, processor):
    handle = vzip.attach(model, budget=6)
    before = digests(model)
    losses = train_projector(model, batch(handle.processor(processor)))
    assert losses[-1] < losses[0]
    after = digests(model)
    changed = {name for name in before if after[name] != before[name]}
    prefix = handle.family.projector_name
    assert changed == {name for name in before if name.startswith(prefix)} != set()


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 0, 3, tiny.SIDE, tiny.SIDE), ["0 frames", "at least 1"]),
        ((0, 2, 3, tiny.SIDE, tiny.SIDE), ["[0, 3, 56, 56]"]),
        ((2, 3, tiny.SIDE, tiny.SIDE), ["[2, 3, 56, 56]", "float[videos, frames, 3, height, width]"]),
        ((1, 2, 1, tiny.SIDE, tiny.SIDE), ["[2, 1, 56, 56]", "float[B, 3, height, width]"]),
    ],
    ids=["no frames", "no videos", "frames alone", "grey"],
)
@pytest.mark.parametrize("reducer", [Identity(), VisionZip(dominant=4, contextual=2)], ids=repr)
def test_tensors_of_another_shape_are_refused(model, reducer, shape, words):
    with vzip.attach(model, reducer=reducer):
        with pytest.raises(UserError) as error:
            model.model.get_video_features(torch.zeros(shape))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("num_frames", [0, -1])
def test_a_video_without_frames_is_refused(model, num_frames):
    for reducer in (Identity(), VisionZip(dominant=4, contextual=2)):
        with vzip.attach(model, reducer=reducer) as handle, pytest.raises(UserError) as error:
            handle.num_video_tokens(num_frames)
        assert f"{num_frames} frames" in str(error.value) and "at least 1" in str(error.value)


@pytest.mark.parametrize("other", [kind for kind in tiny.KINDS if kind not in tiny.VIDEO])
def test_models_that_take_no_videos_say_so(other):
    with vzip.attach(tiny.llava(other), dominant=4, contextual=2) as handle:
        with pytest.raises(UserError) as error:
            handle.num_video_tokens(3)
    assert repr(tiny.KINDS[other][0]) in str(error.value)
    assert "no videos" in str(error.value) or "give images" in str(error.value)


@pytest.mark.parametrize(
    ("videos", "words"),
    [
        ([], ["0 frames"]),
        ([[]], ["0 frames"]),
        ([tiny.video(0), []], ["0 frames"]),
        ([np.zeros((0, 8, 8, 3), np.uint8)], ["0 frames"]),
        ([tiny.video(0, 2), tiny.video(1, 3)], ["[2, 3] frames", "same number"]),
        ([np.zeros((2, 3, 8, 8), np.uint8)], ["uint8[3, 8, 8]", "uint8[height, width, 3]"]),  # channels first
        ([np.zeros((2, 8, 8, 3), np.float32)], ["float32[8, 8, 3]", "uint8[height, width, 3]"]),
        (["clip.mp4"], ["uint8[height, width, 3]"]),
    ],
)
def test_unusable_videos_are_refused(processor, videos, words):
    with pytest.raises(UserError) as error:
        processor.video_processor(videos)
    assert all(word in str(error.value) for word in words), error.value


# ---- Frames without torchvision ----


def base_tiles(processor, frames):
    """float[frames, 3, side, side]: what the image processor makes of each frame, without its other tiles."""
    processed = processor.image_processor(frames, return_tensors="pt")
    if "pixel_values_images" in processed:
        return processed["pixel_values_images"]
    return processed["pixel_values"][:, 0]


@pytest.mark.parametrize("size", [(tiny.SIDE, tiny.SIDE), (40, 90), (150, 60), (5, 7)])
def test_a_frame_has_the_pixels_of_a_base_tile(processor, size):
    frames = [tiny.picture(index, *size) for index in range(3)]
    got = processor.video_processor([frames])["pixel_values_videos"]
    assert got.shape == (1, 3, 3, tiny.SIDE, tiny.SIDE)
    assert torch.equal(got[0], base_tiles(processor, frames))


def test_lists_of_pictures_and_arrays_are_the_same_videos(processor):
    videos = [tiny.video(0), tiny.video(1)]
    arrays = [np.stack([np.asarray(frame) for frame in video]) for video in videos]
    want = processor.video_processor(videos)["pixel_values_videos"]
    assert want.shape[:2] == (2, 3)
    assert not torch.equal(want[0], want[1])
    for same_videos in (arrays, np.stack(arrays), [torch.from_numpy(array) for array in arrays]):
        assert torch.equal(processor.video_processor(same_videos)["pixel_values_videos"], want)
    for one_video in (videos[0], arrays[0], [videos[0]]):
        assert torch.equal(processor.video_processor(one_video)["pixel_values_videos"], want[:1])


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK", "LA"])
def test_frames_of_other_modes_have_their_colours(processor, mode):
    """The pixels of a GIF's frame, for example, are indices into a palette."""
    frames = [frame.convert(mode) for frame in tiny.video(0)]
    got = processor.video_processor([frames])["pixel_values_videos"]
    assert torch.equal(got[0], base_tiles(processor, frames))
    in_colour = [frame.convert("RGB") for frame in frames]
    assert torch.equal(got, processor.video_processor([in_colour])["pixel_values_videos"])


def test_a_saved_model_and_processor_come_back(kind, model, processor, tmp_path):
    """The processor holds what transformers' own class would save, and no name of a class of this project."""
    family = families()[tiny.KINDS[kind][0]]
    processor.chat_template = "{{ messages }}"
    with vzip.attach(model, budget=6) as handle:
        reduced = handle.processor(processor)
        model.save_pretrained(tmp_path)
        reduced.save_pretrained(tmp_path)
        want = batch(reduced)
        answer = logits(model, want)
    plain = batch(processor)
    again = family.load_processor(str(tmp_path))
    loaded = family.load_model(str(tmp_path), dtype=torch.float32)
    assert isinstance(again.video_processor, FrameProcessor)
    assert all(torch.equal(batch(again)[name], plain[name]) for name in plain)
    assert again.chat_template == processor.chat_template
    assert again.vision_feature_select_strategy == processor.vision_feature_select_strategy
    for file in tmp_path.glob("*.json"):
        assert not any(word in file.read_text() for word in ("WithoutTorchvision", "FrameProcessor"))
    assert torch.equal(logits(loaded, plain), logits(model, plain))
    with vzip.attach(loaded, budget=6) as handle:
        got = batch(handle.processor(again))
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert torch.equal(logits(loaded, got), answer)


def test_frames_keep_the_processors_settings():
    """A processor that does not normalize pictures does not normalize frames either."""
    for kind in tiny.VIDEO:
        processor = tiny.processor(kind)
        processor.image_processor.do_normalize = False
        video = [Image.new("RGB", (90, 40), "white")]
        pixels = FrameProcessor(processor.image_processor)([video])["pixel_values_videos"]
        assert torch.equal(pixels, torch.ones_like(pixels))
