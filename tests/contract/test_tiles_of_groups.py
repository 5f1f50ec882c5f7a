"""Models whose tokens are groups of patches of a tile: reduced after the shuffle, before the projector.

The references are written out by hand: attention maps of the tower, and the sequence with all tokens, from
which those that go are taken.
"""

import pytest
import torch

import vzip
from tests.contract.test_kept_positions import Chosen
from tests.helpers import tiny
from tests.helpers.models import GREEDY, logits
from vzip import UserError
from vzip.families import families, family_of
from vzip.media import MediaInputs
from vzip.overlay import look
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.templates import internvl
from vzip.templates.encode import encode
from vzip.templates.jinja import chat_template

pytestmark = pytest.mark.slow

IMAGE_ID = tiny.SPECIAL.index("<image>")
TEXTS = ["<image>a<image>bc", "only text", "de<image>"]
SIZES = [(56, 56), (40, 90), (150, 60)]
VISIONZIP = VisionZip(dominant=4, contextual=2)


def exact_model(**vision):
    """A model in float64, whose tower has these settings."""
    architecture = tiny.shuffled_architecture()
    architecture["vision_config"] |= vision
    torch.manual_seed(0)
    model = families()["internvl"].from_architecture(architecture, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return tiny.exact(model)


@pytest.fixture
def model():
    return exact_model()


@pytest.fixture
def processor():
    return tiny.processor("internvl")


def batch(processor, texts=TEXTS, side="right"):
    """Padded examples with pictures of three sizes, in float64."""
    pictures = [tiny.picture(number, *SIZES[number % 3]) for number in range("".join(texts).count("<image>"))]
    inputs = processor(
        images=pictures or None, text=list(texts), padding=True, padding_side=side, return_tensors="pt"
    )
    return {name: value.double() if name == "pixel_values" else value for name, value in inputs.items()}


def by_group(values, side=8):
    """Mean of float[B, side * side, ...] over 2 x 2 neighbours, in raster order."""
    square = values.unflatten(1, (side // 2, 2, side // 2, 2))
    return square.mean(dim=(2, 4)).flatten(1, 2)


# ---- What the reducer gets ----


@pytest.mark.parametrize(
    "vision", [{}, {"use_qk_norm": True, "norm_type": "rms_norm"}], ids=["plain", "norms"]
)
@torch.no_grad()
def test_scores_and_keys_are_means_over_the_patches_of_a_group(vision, processor):
    """Against the attention maps of a tower that returns them."""
    model = exact_model(**vision)
    family = family_of(model)
    pixels = batch(processor)["pixel_values"]
    tokens = family.vision_tokens(VISIONZIP, pixels)
    assert tokens.features.shape == (8, 16, 4 * 32) and not tokens.has_cls

    # The features are those of the last layer but one: so is the attention.
    caught = {}
    attention = model.model.vision_tower.encoder.layer[-2].attention
    attention.register_forward_hook(lambda module, args, output: caught.update(maps=output[1]))
    attention.k_norm.register_forward_hook(lambda module, args, output: caught.update(keys=output))
    model.model.vision_tower.set_attn_implementation("eager")
    model.model.vision_tower(pixels)
    scores = caught["maps"].mean(dim=1)[:, 0, 1:]
    keys = caught["keys"].unflatten(2, (4, -1)).mean(dim=2)[:, 1:]
    torch.testing.assert_close(tokens.saliency, by_group(scores))
    torch.testing.assert_close(tokens.keys, by_group(keys))


@pytest.mark.parametrize("layer", [-1, -2, 4])
@torch.no_grad()
def test_identity_is_the_model_for_every_tower(layer, processor):
    inputs = batch(processor)
    for vision in ({"use_mean_pooling": False}, {"use_qk_norm": True, "norm_type": "rms_norm"}):
        model = exact_model(**vision)
        model.config.vision_feature_layer = layer
        plain = logits(model, inputs)
        answer = model.generate(**inputs, **GREEDY)
        with vzip.attach(model, reducer=Identity()) as handle:
            same = batch(handle.processor(processor))
            assert torch.equal(same["input_ids"], inputs["input_ids"])
            assert torch.equal(logits(model, same), plain)
            assert torch.equal(model.generate(**same, **GREEDY), answer)


# ---- What the language model gets ----


@torch.no_grad()
def shortened(model, inputs, kept):
    """The logits of each row of the complete sequence without the tokens of each tile that go."""
    inner = model.model
    embeddings = inner.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == IMAGE_ID
    tokens = inner.get_image_features(inputs["pixel_values"]).pooler_output
    embeddings[is_image] = tokens.flatten(0, 1)

    stays = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    stays[:, kept] = True
    is_kept = inputs["attention_mask"].bool()
    is_kept[is_image] = stays.flatten()
    rows = []
    for row, mask in enumerate(is_kept):
        hidden = inner.language_model(inputs_embeds=embeddings[row : row + 1, mask]).last_hidden_state
        rows.append(model.lm_head(hidden)[0])
    return rows


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_the_sequence_shortened_by_hand(model, processor, side):
    expected = shortened(model, batch(processor, side=side), torch.arange(1, 16, 3))
    with vzip.attach(model, reducer=Chosen()) as handle:
        inputs = batch(handle.processor(processor), side=side)
        # Text counts from its own start, also behind padding.
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        actual = logits(model, {**inputs, "position_ids": positions})
    for row, wanted in enumerate(expected):
        mask = inputs["attention_mask"][row].bool()
        assert torch.allclose(actual[row, mask], wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_contextual_token_is_merged_before_the_projector(model, processor):
    vzip.attach(model, reducer=VISIONZIP)
    pixels = batch(processor)["pixel_values"]
    output = VISIONZIP(family_of(model).vision_tokens(VISIONZIP, pixels))
    projected = model.model.multi_modal_projector(output.features)
    assert torch.equal(model.model.get_image_features(pixels).pooler_output, projected)


# ---- Tiles and tokens around them ----


@pytest.mark.parametrize("most", [1, 4, 12])
def test_tiles_are_counted_as_the_processor_cuts_them(processor, most):
    processor.image_processor.max_patches = most
    handle = vzip.attach(tiny.llava("internvl"), reducer=Random(budget=3))
    reduced = handle.processor(processor)
    sizes = [(56, 56), (40, 90), (150, 60), (20, 400), (400, 30), (112, 112), (113, 112), (300, 299), (1, 1)]
    for size in sizes:
        inputs = reduced(images=[tiny.picture(0, *size)], text="<image>", return_tensors="pt")
        num_tiles = len(inputs["pixel_values"])
        assert handle.family.num_tiles(size) == num_tiles <= most + 1
        assert handle.num_image_tokens(size) == 3 * num_tiles == (inputs["input_ids"] == IMAGE_ID).sum()
        around = [tiny.SPECIAL.index(tiny.MARKUP[f"{name}_image_token"]) for name in ("start", "end")]
        assert inputs["input_ids"][0, [0, -1]].tolist() == around

    # The sizes that stand for all ways to cut an image are cut in different ways.
    listed = handle.family.image_sizes
    assert len(set(listed)) == len(listed)
    for height, width in listed:
        count = (height // 56) * (width // 56)
        assert count <= most and handle.family.num_tiles((height, width)) in (count, count + 1)


def test_the_whole_picture_is_shown_by_the_thumbnail(processor):
    handle = vzip.attach(tiny.llava("internvl"), reducer=VISIONZIP)
    picture = tiny.picture(0, 150, 60)
    shown = look(handle.family, VISIONZIP, processor.image_processor, picture)
    pixels = processor.image_processor([picture], return_tensors="pt", do_rescale=False, do_normalize=False)
    thumbnail = MediaInputs.from_processed("image", pixels).pixels[-1]
    assert torch.equal(
        torch.tensor(list(shown.picture.tobytes())).view(56, 56, 3).permute(2, 0, 1), thumbnail
    )
    assert shown.grid == (4, 4) and len(shown.dominant) == 4


# ---- The template ----


@pytest.fixture
def chat_processor(processor):
    """A processor whose tokens have InternVL's names."""
    named = {"start_image": "<img>", "context_image": "<IMG_CONTEXT>", "end_image": "</img>"}
    names = {f"{name}_token": token for name, token in named.items()}
    tokenizer = tiny.tokenizer((*tiny.SPECIAL, *named.values()), names=names | {"video_token": "<video>"})
    return type(processor)(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        video_processor=processor.video_processor,
        image_seq_length=16,
    )


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_ids_are_those_of_the_models_own_chat_template(chat_processor, num_images):
    """Its text is: a placeholder and a newline for each picture, then the question."""
    turns = [("<image>" * num_images + "what is\nthis?", "noise"), ("and now?", None)]
    images = "<IMG_CONTEXT>\n" * num_images
    text = (
        f"<|im_start|>user\n{images}what is\nthis?<|im_end|>\n<|im_start|>assistant\nnoise<|im_end|>\n"
        "<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    )
    pictures = [tiny.picture(number) for number in range(num_images)]
    processed = chat_processor(text=text, images=pictures or None)

    tokenizer = chat_processor.tokenizer
    placeholder = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    ids = []
    for token in encode(internvl(), tokenizer, turns)[0]:
        ids += [token] * (16 if token == placeholder else 1)
    assert processed["input_ids"][0] == ids

    # Exports have a chat template that writes the same text.
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = [{"type": "image"}] * (num_images if number == 0 else 0)
        parts.append({"type": "text", "text": question.replace("<image>", "")})
        messages.append({"role": "user", "content": parts})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    chat_processor.chat_template = chat_template(internvl(), tokenizer)
    assert chat_processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text


def test_a_system_prompt_is_a_turn_of_its_own(chat_processor):
    ids, _ = encode(internvl("Be brief."), chat_processor.tokenizer, [("hi", None)])
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat_processor.tokenizer.decode(ids) == text


# ---- Mistakes, refused before any work ----


def test_models_and_processors_that_do_not_fit_are_refused(model, processor):
    with pytest.raises(UserError, match=r"budget=17.*16 tokens"):
        vzip.attach(model, reducer=VisionZip(budget=17))
    with pytest.raises(UserError, match="is no picture"):
        vzip.attach(model, reducer=VISIONZIP).num_image_tokens((0, 5))

    with pytest.raises(UserError, match="no videos"):
        family_of(model).num_video_tokens(VISIONZIP, 3)
    other = tiny.processor("internvl", grid=5)
    with pytest.raises(UserError, match="tiles of 70 x 70 pixels, and the model takes 56 x 56"):
        family_of(model).read_processor(other)

    model = exact_model()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UserError, match="keeps CLS among the patches"):
        vzip.attach(model, reducer=Identity())
    for vision in ({"image_size": [56, 70]}, {"image_size": [49, 49]}):
        with pytest.raises(UserError, match="can't be divided into groups of 2 x 2 patches"):
            vzip.attach(exact_model(**vision), reducer=Identity())
