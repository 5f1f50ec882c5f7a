"""The golden cases: results of the authors' released code for a tiny checkpoint and its inputs, in float32.

tests/golden/NAME holds `model/`, `case.json` and `case.safetensors`.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import vzip
from tests.conftest import GOLDEN
from tests.helpers import tiny
from vzip.tap import run_tower

TOLERANCE = 1e-5
LAYERS = {"0": "linear_1", "2": "linear_2"}
"""The projector's layers: the authors' names, and those of transformers."""


def error(got, want):
    """Return the norm of the difference, relative to the wanted value; `pytest -s` shows it."""
    assert got.shape == want.shape
    relative = ((got.double() - want.double()).norm() / want.double().norm()).item()
    print(f"relative error {relative:.1e} of float{list(want.shape)}")
    return relative


def pictures(tiles, counts):
    """Pad float[all tiles, 3, H, W] to float[images, most tiles, 3, H, W], with zeros after an image's
    last tile.
    """
    padded = torch.zeros(len(counts), max(counts), *tiles.shape[1:])
    for image, part in enumerate(tiles.split(counts)):
        padded[image, : len(part)] = part
    return padded


CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Return settings and tensors of a case, a function that loads its model, and the pictures as the
    model takes them.
    """
    folder = GOLDEN / request.param
    kind = json.loads((folder / "model" / "config.json").read_text())["model_type"]
    if kind not in vzip.families.families():
        pytest.skip(f"{request.param} is a {kind!r} model, and vzip.families has no such family yet")
    settings = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "case.safetensors")
    tiles = tensors["pixel_values_coarse"].float().div(32).repeat_interleave(14, -1).repeat_interleave(14, -2)
    images, sizes = {"pixel_values": tiles}, [None] * len(tiles)
    if settings["tiles"]:
        sizes = [(height, width) for width, height in settings["image_sizes_width_height"]]
        images = {"pixel_values": pictures(tiles, settings["tiles"]), "image_sizes": torch.tensor(sizes)}
    return SimpleNamespace(
        model=lambda: AutoModelForImageTextToText.from_pretrained(
            folder / "model", dtype=torch.float32
        ).eval(),
        budget={name: settings[name] for name in ("dominant", "contextual")},
        image_id=settings["image_token_id_hf"],
        want=tensors,
        tiles=tiles,
        images=images,
        sizes=sizes,
    )


def expand(case, counts):
    """Repeat the placeholder of each image as often as `counts` says, and pad on the right again."""
    counts = iter(counts)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "labels", "attention_mask")}
    for row in range(len(case.want["input_ids"])):
        kept = case.want["attention_mask"][row].bool()
        ids = case.want["input_ids"][row][kept]
        repeats = torch.tensor([next(counts) if token == case.image_id else 1 for token in ids.tolist()])
        for name, values in rows.items():
            values.append(case.want[name][row][kept].repeat_interleave(repeats))
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding[name])
        for name, values in rows.items()
    }


@pytest.fixture(scope="module")
def attached(case):
    """Run forward without a reducer; attach one through the public API, and run forward and backward once."""
    model = case.model()
    with torch.no_grad():
        features = model.model.get_image_features(**case.images).pooler_output
        full = model(**expand(case, [len(image) for image in features]), **case.images)

    handle = vzip.attach(model, **case.budget)
    rows = expand(case, [handle.num_image_tokens(size) for size in case.sizes])
    answer = model(**rows, **case.images)
    answer.loss.backward()
    with torch.no_grad():
        output = tiny.reduce(handle, case.tiles)
    return SimpleNamespace(handle=handle, rows=rows, answer=answer, full_loss=full.loss, output=output)


@torch.no_grad()
def test_kept_indices_and_reduced_features(case, attached):
    family = attached.handle.family
    want = case.want["kept_indices"]
    assert torch.equal(attached.output.dominant, want.sort(dim=1).values)
    assert error(attached.output.features, case.want["reduced"]) < TOLERANCE

    layer = family.model.config.vision_feature_layer
    tokens = run_tower(family.tower, case.tiles, feature_layer=layer, num_dropped=1, attention_layer=layer)
    cls = int(tokens.has_cls)
    falling = tokens.saliency.argsort(dim=1, descending=True)[:, : want.shape[1] - cls] + cls
    assert not want[:, :cls].any()  # CLS is token 0 and comes first, whatever its score
    assert torch.equal(want[:, cls:], falling)


def test_what_the_language_model_receives(case, attached):
    model, seen = attached.handle.family.model, {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**attached.rows, **case.images)
    hook.remove()
    mask = case.want["expanded_mask"].bool()
    assert error(seen["inputs_embeds"][mask], case.want["inputs_embeds"][mask]) < TOLERANCE


def test_a_step_of_training(case, attached):
    assert torch.equal(attached.rows["labels"], case.want["expanded_labels"])
    assert torch.equal(attached.rows["attention_mask"], case.want["expanded_mask"])
    mask = case.want["expanded_mask"].bool()
    assert error(attached.answer.logits[mask], case.want["logits"][mask]) < TOLERANCE
    assert error(attached.answer.loss.reshape(1), case.want["loss"]) < TOLERANCE
    assert error(attached.full_loss.reshape(1), case.want["full.loss"]) < TOLERANCE

    projector = attached.handle.family.projector
    for name in (name for name in case.want if name.startswith("grad.")):
        _, layer, kind = name.split(".")
        got = projector.get_submodule(LAYERS[layer]).get_parameter(kind).grad
        assert error(got, case.want[name]) < TOLERANCE, name


@torch.no_grad()
def test_images_may_share_an_example(case, attached):
    """Put all images in one example, beside one without an image: every image has the same features."""
    rows = attached.rows
    kept = rows["attention_mask"].bool()
    ids = [*rows["input_ids"][kept].split(kept.sum(dim=1).tolist())]
    shared = [torch.cat(ids), torch.tensor([1, 5, 6])]
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(shared, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in shared], batch_first=True
        ),
    }
    answer = attached.handle.family.model(**batch, **case.images)
    assert torch.equal(answer.image_hidden_states, attached.answer.image_hidden_states)
    # Nothing new stands before the first image, so the answer to its example is the same.
    mask = kept[0]
    assert error(answer.logits[0, : mask.sum()], attached.answer.logits[0][mask]) < TOLERANCE
