"""Videos: every frame is reduced by itself, in models, processors, generation and training alike."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

import vzip
from tests.helpers import tiny
from vzip import UserError
from vzip.families import families
from vzip.media import FrameProcessor
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
ROWS = [  # text, pictures, videos
    ("<video>a", [], [0]),
    ("<image>b<video>cd", [(40, 90)], [1]),
    ("only text", [], []),
]


@pytest.fixture(params=tiny.VIDEO)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny.llava(kind, layers=3)


@pytest.fixture
def processor(kind):
    return tiny.processor(kind)


def batch(processor, rows=ROWS, side="right", num_frames=3):
    """Rows with pictures and videos of their own, padded, as the processor returns them."""
    pictures = [
        [tiny.picture(index, *size) for size in sizes] for index, (_, sizes, _) in enumerate(rows) if sizes
    ]
    videos = [tiny.video(seed, num_frames) for *_, seeds in rows for seed in seeds]
    texts = [text for text, *_ in rows]
    return processor(
        images=pictures or None,
        videos=videos or None,
        text=texts,
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@torch.no_grad()
def frame_features(model, pixel_values_videos, num_tokens):
    """float[videos, frames, T, d_llm], and OneVision's newlines float[videos, 1, d_llm] (of Video-LLaVA: none)."""
    made = model.model.get_video_features(pixel_values_videos=pixel_values_videos).pooler_output
    num_videos, num_frames = pixel_values_videos.shape[:2]
    made = made.reshape(num_videos, -1, made.shape[-1])
    frames, newlines = made[:, : num_frames * num_tokens], made[:, num_frames * num_tokens :]
    return frames.view(num_videos, num_frames, num_tokens, -1), newlines


def digests(model, *, without):
    """sha256 of every parameter and buffer but the named module's."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not name.startswith(without)
    }


# The identity reducer, and coming back


def test_identity_is_the_plain_model_bit_for_bit(model, processor):
    inputs = batch(processor)
    plain = logits(model, inputs)
    with vzip.attach(model, reducer=Identity()) as handle:
        reduced = batch(handle.processor(processor))
        assert all(torch.equal(reduced[name], inputs[name]) for name in inputs)
        assert torch.equal(logits(model, reduced), plain)
        for num_frames in (1, 2, 5):
            ids = batch(processor, ROWS[:1], num_frames=num_frames)["input_ids"]
            assert (ids == model.config.video_token_id).sum() == handle.num_video_tokens(num_frames)


def test_detach_restores_both_seams(model, processor):
    inputs, before = batch(processor), set(vars(model.model))
    plain = logits(model, inputs)
    handle = vzip.attach(model, budget=6)
    assert set(vars(model.model)) - before == {"get_image_features", "get_video_features"}
    reduced = batch(handle.processor(processor))
    assert logits(model, reduced).shape[1] < plain.shape[1]
    handle.detach()
    assert set(vars(model.model)) == before
    assert torch.equal(logits(model, inputs), plain)
    with pytest.raises(
        ValueError, match="do not match"
    ):  # rows of the reduced model are refused by the plain one
        logits(model, reduced)


# How many tokens


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5])
def test_handle_processor_and_model_agree_on_the_number_of_tokens(kind, model, processor, num_frames):
    newline = int(kind == "onevision")
    for settings in ({"budget": 6}, {"dominant": 3, "contextual": 4}, {"budget": 6, "anyres": "spatial"}):
        with vzip.attach(model, **settings) as handle:
            budget = handle.reducer.dominant + handle.reducer.contextual
            count = handle.num_video_tokens(num_frames)
            assert count == num_frames * budget + newline
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
                sizes = handle.processor(processor)._get_num_multimodal_tokens(
                    video_sizes=[(num_frames, 90, 40)]
                )
                assert sizes.num_video_tokens == [count]


@pytest.mark.parametrize(
    "settings",
    [
        {"reducer": Random(budget=5)},
        {"reducer": Random(budget=5), "anyres": "spatial"},
        {"dominant": 0, "contextual": 4},
    ],
    ids=repr,
)
def test_other_reducers_take_videos_alike(model, processor, settings):
    with vzip.attach(model, **settings) as handle:
        inputs = batch(handle.processor(processor))
        counts = (inputs["input_ids"] == model.config.video_token_id).sum(dim=1).tolist()
        assert counts == [handle.num_video_tokens(3)] * 2 + [0]
        assert logits(model, inputs).isfinite().all()


# Every frame by itself


@pytest.mark.parametrize("anyres", ["released", "spatial"])
def test_a_frame_is_reduced_the_same_in_every_video(kind, model, processor, anyres):
    frames = tiny.video(0, 5)
    videos = [
        [frames[0], frames[1], frames[2]],
        [frames[3], frames[1], frames[4]],
        [frames[2], frames[0], frames[0]],
    ]
    pixels = processor.video_processor(videos)["pixel_values_videos"]
    with vzip.attach(model, dominant=4, contextual=2, anyres=anyres):
        together, newlines = frame_features(model, pixels, 6)
        for video in range(3):
            alone, _ = frame_features(model, pixels[video : video + 1], 6)
            torch.testing.assert_close(alone[0], together[video], rtol=1e-5, atol=1e-6)
    assert newlines.shape[1] == int(kind == "onevision")
    assert all(torch.equal(newline, model.model.image_newline) for newline in newlines.flatten(0, 1))
    for (video, frame), (other, place) in [
        ((0, 1), (1, 1)),
        ((0, 0), (2, 1)),
        ((0, 2), (2, 0)),
        ((2, 1), (2, 2)),
    ]:
        torch.testing.assert_close(together[video, frame], together[other, place], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together[0, 0], together[0, 1], atol=1e-2)


def test_a_frame_is_what_handle_reduce_makes_of_it(model, processor):
    """The same tokens, projected; Video-LLaVA sees its videos with a tower of their own."""
    pixels = processor.video_processor([tiny.video(0)])["pixel_values_videos"]
    if hasattr(model.model, "video_tower"):
        model.model.video_tower.load_state_dict(model.model.image_tower.state_dict())
    with vzip.attach(model, dominant=4, contextual=2) as handle, torch.no_grad():
        (got,), _ = frame_features(model, pixels, 6)
        want = handle.family.projector(tiny.reduce(handle, pixels[0]).features)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_video_llava_reads_videos_with_its_video_tower():
    model = tiny.llava("video", layers=3)
    pixels = tiny.processor("video").video_processor([tiny.video(0)])["pixel_values_videos"]
    with vzip.attach(model, dominant=4, contextual=2), torch.no_grad():
        before = frame_features(model, pixels, 6)[0], model.model.get_image_features(pixels[0]).pooler_output
        for parameter in model.model.video_tower.parameters():
            parameter.mul_(-1)
        after = frame_features(model, pixels, 6)[0], model.model.get_image_features(pixels[0]).pooler_output
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_a_batch_is_its_rows_one_by_one(model, processor):
    with vzip.attach(model, budget=6) as handle:
        reduced = handle.processor(processor)
        inputs = batch(reduced)
        together = logits(model, inputs)
        for row, (text, sizes, seeds) in enumerate(ROWS):
            alone = batch(reduced, [(text, sizes, seeds)])
            if sizes:  # the picture of this row, and not the first one
                pictures = [[tiny.picture(row, *size) for size in sizes]]
                videos = [tiny.video(seed) for seed in seeds]
                alone = reduced(images=pictures, videos=videos, text=[text], return_tensors="pt")
            kept = inputs["attention_mask"][row].bool()
            assert torch.equal(alone["input_ids"][0], inputs["input_ids"][row, kept])
            torch.testing.assert_close(logits(model, alone)[0], together[row, kept], rtol=1e-4, atol=1e-5)


# Generation and training


def test_greedy_generation_of_a_batch_is_row_by_row(model, processor):
    rows = [("<image>a<video>bcdef", [(40, 90)], [0]), ("g<video>", [], [1])]
    with vzip.attach(model, budget=6) as handle:
        reduced = handle.processor(processor)
        inputs = batch(reduced, rows, side="left")
        assert inputs["attention_mask"][1, 0] == 0
        together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        for row, answer in zip(rows, together, strict=True):
            alone = batch(reduced, [row])
            assert torch.equal(model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :], answer)
        assert len(set(together.flatten().tolist())) > 2  # not the one token that a broken model repeats
        renamed = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for medium in ("image", "video"):
            renamed |= tiny.media_arguments(medium, inputs)
        assert torch.equal(model.generate(**renamed, **GREEDY)[:, inputs["input_ids"].shape[1] :], together)


def test_video_rows_train_the_projector_alone(model, processor):
    handle = vzip.attach(model, budget=6)
    name, projector = handle.family.projector_name, handle.family.projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    model.train()
    before, start = (
        digests(model, without=name),
        [parameter.detach().clone() for parameter in projector.parameters()],
    )
    inputs = batch(handle.processor(processor))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(projector.parameters(), start, strict=True))
    assert digests(model, without=name) == before


def test_gradients_come_from_the_frames_too(model, processor):
    with vzip.attach(model, budget=6):
        pixels = processor.video_processor([tiny.video(0)])["pixel_values_videos"]
        features = model.model.get_video_features(pixels).pooler_output
        gradients = torch.autograd.grad(
            features.square().mean(), list(model.model.multi_modal_projector.parameters())
        )
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


# Mistakes


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
def test_tensors_that_are_no_videos_are_named(model, reducer, shape, words):
    with vzip.attach(model, reducer=reducer):
        with pytest.raises(UserError) as error:
            model.model.get_video_features(torch.zeros(shape))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("num_frames", [0, -1])
def test_a_video_without_frames_takes_no_tokens(model, num_frames):
    for reducer in (Identity(), VisionZip(dominant=4, contextual=2)):
        with vzip.attach(model, reducer=reducer) as handle, pytest.raises(UserError) as error:
            handle.num_video_tokens(num_frames)
        assert f"{num_frames} frames" in str(error.value) and "at least 1" in str(error.value)


@pytest.mark.parametrize("other", [kind for kind in tiny.KINDS if kind not in tiny.VIDEO])
def test_models_without_videos_say_so(other):
    with vzip.attach(tiny.llava(other), dominant=4, contextual=2) as handle:
        with pytest.raises(UserError) as error:
            handle.num_video_tokens(3)
    assert repr(tiny.KINDS[other][0]) in str(error.value) and "no videos" in str(error.value)


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
    ids=[
        "no videos",
        "an empty list",
        "one empty list",
        "an empty array",
        "uneven",
        "channels first",
        "floats",
        "a path",
    ],
)
def test_frames_that_can_not_be_shown_are_named(processor, videos, words):
    with pytest.raises(UserError) as error:
        processor.video_processor(videos)
    assert all(word in str(error.value) for word in words), error.value


# Frames without torchvision


def base_tiles(processor, frames):
    """float[frames, 3, side, side]: what the model's image processor makes of each frame, without the tiles."""
    made = processor.image_processor(frames, return_tensors="pt")
    if "pixel_values_images" in made:
        return made["pixel_values_images"]
    return made["pixel_values"][:, 0]


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
    for given in (arrays, np.stack(arrays), [torch.from_numpy(array) for array in arrays]):
        assert torch.equal(processor.video_processor(given)["pixel_values_videos"], want)
    for given in (videos[0], arrays[0], [videos[0]]):  # one video
        assert torch.equal(processor.video_processor(given)["pixel_values_videos"], want[:1])


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK", "LA"])
def test_frames_of_other_modes_have_their_colours(processor, mode):
    """A frame of a GIF has a palette: its pixels are no colours."""
    frames = [frame.convert(mode) for frame in tiny.video(0)]
    got = processor.video_processor([frames])["pixel_values_videos"]
    assert torch.equal(got[0], base_tiles(processor, frames))
    if mode == "P":
        assert torch.equal(
            got,
            processor.video_processor([[frame.convert("RGB") for frame in frames]])["pixel_values_videos"],
        )


def test_a_saved_model_and_processor_come_back(kind, model, processor, tmp_path):
    family, texts = families()[tiny.KINDS[kind][0]], "a b c"
    with vzip.attach(model, budget=6) as handle:
        reduced = handle.processor(processor)
        model.save_pretrained(tmp_path)
        reduced.save_pretrained(tmp_path)
        want = batch(reduced)
        answer = logits(model, want)
    plain = batch(processor)
    again, loaded = (
        family.load_processor(str(tmp_path)),
        family.load_model(str(tmp_path), dtype=torch.float32),
    )
    assert isinstance(again.video_processor, FrameProcessor)
    assert all(torch.equal(batch(again)[name], plain[name]) for name in plain)
    assert again.tokenizer(texts)["input_ids"] == processor.tokenizer(texts)["input_ids"]
    assert torch.equal(logits(loaded, plain), logits(model, plain))
    with vzip.attach(loaded, budget=6) as handle:
        got = batch(handle.processor(again))
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert torch.equal(logits(loaded, got), answer)


def test_a_saved_processor_has_a_chat_template_and_its_own_tokens(kind, processor, tmp_path):
    """What transformers' own class would keep, and no name of a class that only this project has."""
    processor.chat_template = "{{ messages }}"
    processor.save_pretrained(tmp_path)
    again = families()[tiny.KINDS[kind][0]].load_processor(str(tmp_path))
    assert again.chat_template == processor.chat_template
    assert again.video_token == "<video>" and again.image_token == "<image>"
    assert again.vision_feature_select_strategy == processor.vision_feature_select_strategy
    assert not [file.name for file in tmp_path.iterdir() if b"WithoutTorchvision" in file.read_bytes()]
    assert not [file.name for file in tmp_path.iterdir() if b"FrameProcessor" in file.read_bytes()]


def test_frames_keep_the_processors_settings():
    """A processor whose pictures are not normalised makes frames that are not."""
    for kind in tiny.VIDEO:
        processor = tiny.processor(kind)
        processor.image_processor.do_normalize = False
        pixels = FrameProcessor(processor.image_processor)([[Image.new("RGB", (90, 40), "white")]])[
            "pixel_values_videos"
        ]
        assert torch.equal(pixels, torch.ones_like(pixels))
