"""Models with positions of time, row and column: tokens that stay keep their own, and text goes on where it
does with all tokens.

The reference is written out by hand: the sequence with all tokens, from which those that go are taken.
"""

from dataclasses import dataclass

import pytest
import torch
from transformers import Qwen3VLProcessor

import vzip
from tests.helpers import tiny
from tests.helpers.models import GREEDY, logits
from vzip import UserError
from vzip.reducers.base import ReducerOutput
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.tap import received_attention

pytestmark = pytest.mark.slow

IMAGE_ID = tiny.SPECIAL.index("<image>")
VIDEO_ID = tiny.SPECIAL.index("<video>")
TEXTS = ["<image>a<image>bc", "only text", "d <video> ef", "<video><image>gh"]
SIZES = [(56, 56), (40, 90), (150, 60)]
VISIONZIP = VisionZip(dominant=4, contextual=2)


@pytest.fixture(params=tiny.NATIVE)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny.exact(tiny.llava(kind, dtype=torch.float64))


@pytest.fixture
def processor(kind):
    return tiny.processor(kind)


def batch(processor, texts=TEXTS, side="right", seconds=None):
    """Padded examples with pictures of three sizes, and videos of 3 and 2 frames if the model takes them,
    in float64.
    """
    if isinstance(processor, Qwen3VLProcessor):
        texts = [text.replace("<video>", "") for text in texts]
    num_images = "".join(texts).count("<image>")
    pictures = [tiny.picture(number, *SIZES[number]) for number in range(num_images)]
    videos = [tiny.video(seed, 3 - seed) for seed in range("".join(texts).count("<video>"))]
    media = {name: values for name, values in (("images", pictures), ("videos", videos)) if values}
    inputs = dict(processor(text=list(texts), padding=True, padding_side=side, return_tensors="pt", **media))
    inputs.pop("video_metadata", None)
    if seconds is not None and "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return {name: value.double() if name.startswith("pixel") else value for name, value in inputs.items()}


@dataclass
class Chosen:
    """Keeps one of three tokens, beginning with another one in pictures of other sizes."""

    uses_attention = False
    layer = None

    def num_tokens(self, num_patches, *, has_cls, num_dropped):
        return len(range(num_patches % 3, num_patches, 3))

    def __call__(self, tokens):
        num_pictures, num_tokens, _ = tokens.features.shape
        kept = torch.arange(num_tokens % 3, num_tokens, 3).expand(num_pictures, -1)
        features = tokens.features[:, kept[0]]
        slots = torch.full((num_pictures, num_tokens), -1).scatter(
            1, kept, torch.arange(kept.shape[1]).expand_as(kept)
        )
        return ReducerOutput(features, dominant=kept, contextual=kept[:, :0], slots=slots)


@torch.no_grad()
def shortened(model, inputs, keeps):
    """The logits of each row of the complete sequence without the tokens that go, and the positions.

    Args:
        keeps: by number of tokens of a picture, those that stay.
    """
    inner = model.model
    positions, _ = inner.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})
    embeddings = inner.get_input_embeddings()(inputs["input_ids"])
    is_kept = inputs["attention_mask"].bool().clone()
    deepstack = []
    for name, placeholder in (("image", IMAGE_ID), ("video", VIDEO_ID)):
        if f"{name}_grid_thw" not in inputs:
            continue
        grids = inputs[f"{name}_grid_thw"]
        pixels = inputs["pixel_values" + ("_videos" if name == "video" else "")]
        encoded = getattr(inner, f"get_{name}_features")(pixels, grids)
        tokens = torch.cat(encoded.pooler_output)
        embeddings[inputs["input_ids"] == placeholder] = tokens.to(embeddings)
        for tokens in getattr(encoded, "deepstack_features", []):
            added = torch.zeros_like(embeddings)
            added[inputs["input_ids"] == placeholder] = torch.cat(tokens).to(embeddings)
            deepstack.append(added)

        stays = []
        for steps, rows, columns in grids.tolist():
            num_tokens = rows * columns // 4
            mask = torch.zeros(num_tokens, dtype=torch.bool)
            mask[keeps(num_tokens)] = True
            stays += [mask] * steps
        is_kept[inputs["input_ids"] == placeholder] = torch.cat(stays)

    rows = []
    for row, kept in enumerate(is_kept):
        more = {}
        if deepstack:
            # Text is among them, with zeros.
            more["visual_pos_masks"] = torch.ones(1, int(kept.sum()), dtype=torch.bool)
            more["deepstack_visual_embeds"] = [added[row, kept] for added in deepstack]
        output = inner.language_model(
            inputs_embeds=embeddings[row : row + 1, kept],
            position_ids=positions[:, row : row + 1, kept],
            **more,
        )
        rows.append(model.lm_head(output.last_hidden_state)[0])
    return rows


@pytest.mark.parametrize("seconds", [None, [0.5, 2.0]], ids=["usual speed", "other speeds"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_the_sequence_shortened_by_hand(model, processor, side, seconds):
    reducer = Chosen()
    full = batch(processor, side=side, seconds=seconds)
    expected = shortened(model, full, lambda count: torch.arange(count % 3, count, 3))
    with vzip.attach(model, reducer=reducer) as handle:
        inputs = batch(handle.processor(processor), side=side, seconds=seconds)
        actual = logits(model, inputs)

        # The same positions if the model has them before it encodes, as in `generate`.
        positions, _ = model.model.get_rope_index(**inputs)
        again = logits(model, {**inputs, "position_ids": positions})
    for row, wanted in enumerate(expected):
        mask = inputs["attention_mask"][row].bool()
        assert torch.allclose(actual[row, mask], wanted, rtol=0, atol=1e-12)
        assert torch.allclose(again[row, mask], wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_identity_has_the_models_own_positions(model, processor):
    inputs = batch(processor, seconds=[0.7, 1.3])
    expected = model.model.get_rope_index(**inputs)
    plain = model.generate(**inputs, **GREEDY)
    with vzip.attach(model, reducer=Identity()):
        for actual, wanted in zip(model.model.get_rope_index(**inputs), expected, strict=True):
            assert torch.equal(actual, wanted)
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)


@torch.no_grad()
def test_a_contextual_token_is_merged_before_the_merger_and_stands_at_its_target(model, processor):
    handle = vzip.attach(model, reducer=VISIONZIP)
    inputs = batch(handle.processor(processor), ["<image>a"])
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    tokens = handle.family.run_groups(VISIONZIP, pixels, grids)
    output = VISIONZIP(tokens)
    source = torch.cat([output.dominant, output.contextual], dim=1)[0]

    # The first columns are those of the tower's last layer.
    family = handle.family
    merged = family.run_projector(output.features[0, :, : family.group_width])[source.argsort()]
    assert torch.equal(torch.cat(model.model.get_image_features(pixels, grids).pooler_output), merged)

    rows, columns = (grids[0, 1:] // 2).tolist()
    kept = source.sort().values
    positions, delta = model.model.get_rope_index(**inputs)
    places = positions[:, 0, inputs["input_ids"][0] == IMAGE_ID]
    assert places.tolist() == [[0] * 6, (kept // columns).tolist(), (kept % columns).tolist()]
    assert positions[:, 0, -1].tolist() == [max(rows, columns)] * 3
    assert delta.item() == max(rows, columns) + 1 - inputs["input_ids"].shape[1]


@torch.no_grad()
def test_scores_and_keys_are_means_over_the_patches_of_a_group(kind, model, processor):
    """Against the attention maps of a tower that returns them, in its own order of windows."""
    family = vzip.families.family_of(model)
    inputs = batch(processor, ["<image>a<image>b"])
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    tokens = family.run_groups(VISIONZIP, pixels, grids)

    rotated = {}
    plain = family.rotate
    try:
        type(family).rotate = staticmethod(lambda *args: rotated.setdefault("heads", plain(*args)))
        family.run_groups(VISIONZIP, pixels, grids)
    finally:
        type(family).rotate = staticmethod(plain)
    queries, keys = (heads.double() for heads in rotated["heads"])

    # Picture by picture, in raster order: patch 4 g + i is in group g.
    order = family.group_order(grids)
    first = 0
    for count in (grids.prod(dim=1) // 4).tolist():
        groups = [order.tolist().index(first + group) for group in range(count)]
        patches = torch.tensor([4 * group + inside for group in groups for inside in range(4)])
        received = received_attention(
            queries[patches].transpose(0, 1)[None], keys[patches].transpose(0, 1)[None]
        )
        own = slice(first, first + count)
        torch.testing.assert_close(tokens.saliency[0, own], received.view(count, 4).mean(dim=1))
        torch.testing.assert_close(
            tokens.keys[0, own], keys[patches].mean(dim=1).view(count, 4, -1).mean(dim=1)
        )
        first += count


# ---- Generation ----


@torch.no_grad()
def test_several_turns_go_on_at_the_right_positions(model, processor):
    reduced = vzip.attach(model, reducer=VISIONZIP).processor(processor)
    inputs = batch(reduced, ["<image>abc"])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    question = reduced.tokenizer("and now?", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, question], dim=1)
    mask = torch.ones_like(ids)
    second = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
    )

    types = torch.zeros_like(ids)
    types[:, : inputs["mm_token_type_ids"].shape[1]] = inputs["mm_token_type_ids"]
    whole = {**inputs, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    assert torch.equal(second, model.generate(**whole, **GREEDY))


def test_videos_that_a_model_does_not_take_are_refused(kind, model, processor):
    handle = vzip.attach(model, reducer=VISIONZIP)
    if "video" in handle.family.kinds:
        return
    inputs = batch(handle.processor(processor), ["<image>a"])
    with pytest.raises(UserError, match="takes no videos"):
        model.model.get_rope_index(**inputs, video_grid_thw=inputs["image_grid_thw"])
    with pytest.raises(UserError, match="text stands between their steps"):
        handle.num_video_tokens(4)
    with pytest.raises(UserError, match="text stands between their steps"):
        handle.processor(processor)(text=["<video>a"], videos=[tiny.video(1)], return_tensors="pt")


def test_token_types_are_those_of_the_processor(kind, processor):
    inputs = batch(processor, side="left")
    types = vzip.families.family_of(tiny.llava(kind)).text_arguments(inputs["input_ids"])
    assert torch.equal(types["mm_token_type_ids"], inputs["mm_token_type_ids"])


# ---- Budgets ----


@pytest.mark.parametrize("reducer", [VisionZip(keep=0.25), Random(keep=0.25)], ids=["visionzip", "random"])
def test_a_share_is_counted_from_the_size_of_each_picture(model, processor, reducer):
    handle = vzip.attach(model, reducer=reducer)
    inputs = batch(handle.processor(processor))
    for size, grid in zip(SIZES, inputs["image_grid_thw"], strict=True):
        assert handle.num_image_tokens(size) == round(0.25 * int(grid.prod()) / 4)
    num_images = sum(handle.num_image_tokens(size) for size in SIZES)
    assert (inputs["input_ids"] == IMAGE_ID).sum() == num_images
    assert logits(model, inputs).isfinite().all()


def test_a_picture_of_fewer_tokens_than_the_budget_keeps_all_of_them(model, processor):
    plain_inputs = batch(processor, ["<image>a"])
    plain = logits(model, plain_inputs)
    handle = vzip.attach(model, budget=1000)
    inputs = batch(handle.processor(processor), ["<image>a"])
    assert torch.equal(inputs["input_ids"], plain_inputs["input_ids"])
    assert torch.allclose(logits(model, inputs), plain, rtol=0, atol=1e-12)


# ---- Mistakes, refused before any work ----


def test_inputs_that_do_not_fit_are_refused(kind, model, processor):
    handle = vzip.attach(model, reducer=VISIONZIP)
    inputs = batch(handle.processor(processor), ["<image>a"])
    features = model.model.get_image_features
    grid = inputs["image_grid_thw"]
    for changed, words in (
        (torch.tensor([[1, 1, 2]]), "a visual token is made of 2 x 2; give a larger picture"),
        (torch.tensor([[0, 4, 4]]), "without frames"),
        (grid + torch.tensor([0, 2, 0]), "counts .* patches, but there are"),
        (grid[0], "holds no images"),
    ):
        with pytest.raises(UserError, match=words):
            features(inputs["pixel_values"], changed)
    with pytest.raises(UserError, match="of at least 1 frame"):
        processor.video_processor([[]])
    with pytest.raises(UserError, match="too long for this model"):
        handle.num_image_tokens((4000, 3))
    with pytest.raises(
        UserError, match=f"{inputs['input_ids'].shape[1] - 1} placeholders of images.*encoded"
    ):
        model.model.vzip_encoded.latest.clear()
        model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=grid)


def test_a_layer_within_windows_is_refused_at_attach():
    with pytest.raises(UserError, match=r"reducer.layer=1 attends within windows.*choose one of 2, 4"):
        vzip.attach(tiny.llava("qwen2.5-vl"), reducer=VisionZip(dominant=4, contextual=2, layer=1))
    vzip.attach(tiny.llava("qwen2.5-vl"), reducer=VisionZip(dominant=4, contextual=2, layer=2)).detach()
