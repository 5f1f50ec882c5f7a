"""Both losses are the stock model's, for every family: the same sum over label tokens, the same gradient."""

import pytest
import torch

import vzip
from data.batches.collate import Collator, Packer
from data.batches.packing import shared_prefix
from tests.helpers import tiny
from tests.helpers.examples import (
    IMAGE_TEXTS,
    NUM_FRAMES,
    NUM_LABELS,
    VIDEO_TEXTS,
    examples_of,
    process,
    texts_of,
)
from train.losses import FastLoss, ReferenceLoss
from vzip.families import family_of
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
VISIONZIP = VisionZip(dominant=4, contextual=2)
REDUCERS = {
    "all tokens": (Identity(), "released"),
    "visionzip": (VISIONZIP, "released"),
    "spatial": (VISIONZIP, "spatial"),
    "average, early layer": (
        VisionZip(dominant=3, contextual=4, merge="average", keep_cls=False, layer=2),
        "released",
    ),
}


def frozen_but_the_projector(kind, dtype=torch.float32):
    model = tiny.llava(kind, dtype=dtype).requires_grad_(False)
    family_of(model).projector.float().requires_grad_(True)
    return model


def projector_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in family_of(model).projector.parameters()]


def fast_loss(family, collator, examples, prefix):
    """The loss of packed examples behind a prefix."""
    loss = FastLoss(family, [collator.reducer], prefix=prefix, recompute=False)
    loss.run_prefix(CPU)
    return loss(Packer(collator, num_prefix=len(prefix))(examples))[0]


def our_losses(handle, kind, examples, kinds=None):
    """The losses of both paths: sums over the label tokens of the examples."""
    family = handle.family
    collator = Collator(
        tiny.processor(kind), family, handle.reducer, kinds=kinds or examples.kinds, num_frames=NUM_FRAMES
    )
    prefix = shared_prefix(examples, [family.placeholder_id(kind) for kind in collator.kinds])
    assert bool(prefix) == any(example.media for example in examples)

    reference = ReferenceLoss(family, handle.reducer, text_has_gradient=True)
    return {
        "reference": reference(collator(examples))[0],
        "fast": fast_loss(family, collator, examples, prefix),
    }


def stock_loss(handle, kind, texts, examples):
    """The same sum, computed by transformers alone."""
    model = handle.family.model
    inputs = process(handle.processor(tiny.processor(kind)), texts, examples)
    for name, values in inputs.items():
        if values.is_floating_point():
            inputs[name] = values.to(model.dtype)

    lengths = inputs["attention_mask"].sum(dim=1, keepdim=True)
    positions = torch.arange(inputs["input_ids"].shape[1])
    has_label = (positions < lengths) & (positions >= lengths - NUM_LABELS)
    labels = torch.where(has_label, inputs["input_ids"], IGNORED)
    return model(**inputs, labels=labels).loss * NUM_LABELS * len(texts)


def assert_losses_are_the_stock_models(handle, kind, texts, folder, kinds=None):
    model = handle.family.model
    texts = [f"see: {text}" for text in texts]
    examples = examples_of([tiny.marked(kind, text) for text in texts], folder)
    stock = stock_loss(handle, kind, texts, examples)
    expected = [gradient.clone() for gradient in projector_gradients(model, stock)]
    assert stock > 0 and all(gradient.any() for gradient in expected)

    for path, loss in our_losses(handle, kind, examples, kinds).items():
        assert loss.item() == pytest.approx(stock.item(), rel=1e-6), path
        for gradient, other in zip(projector_gradients(model, loss), expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_loss_and_gradients_are_the_stock_models(tmp_path, kind, name):
    reducer, anyres = REDUCERS[name]
    with vzip.attach(frozen_but_the_projector(kind), reducer=reducer, anyres=anyres) as handle:
        assert_losses_are_the_stock_models(handle, kind, texts_of(kind), tmp_path)


@pytest.mark.parametrize("texts", [IMAGE_TEXTS, VIDEO_TEXTS[:1]], ids=["images", "a video"])
@pytest.mark.parametrize("kind", tiny.VIDEO)
def test_a_blank_picture_or_video_changes_no_loss(tmp_path, kind, texts):
    with vzip.attach(frozen_but_the_projector(kind), reducer=VISIONZIP) as handle:
        assert_losses_are_the_stock_models(handle, kind, texts, tmp_path, kinds=handle.family.kinds)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_text_alone_runs_all_modules_and_gives_no_gradient(tmp_path, kind):
    """Under ZeRO 3 the ranks wait for each other in every module."""
    model = frozen_but_the_projector(kind)
    with vzip.attach(model, reducer=VISIONZIP) as handle:
        family = handle.family
        # A merger is a part of its tower, which then runs an empty one.
        towers = {part for title, part in family.frozen_parts.items() if "tower" in title}
        runs = 1
        if kind in tiny.NATIVE:
            towers = {family.tower}
            runs = 2
        run = []
        for part in (*towers, *family.projector_modules):
            part.register_forward_hook(lambda module, *_: run.append(module))

        def assert_all_run_without_a_gradient(loss, *, times=1):
            assert set(run) == {*towers, *family.projector_modules}
            assert run.count(family.projector_modules[-1]) == runs * times * len(family.kinds)
            assert all(value is not None and not value.any() for value in projector_gradients(model, loss))
            run.clear()

        texts = ["no picture", "nor here"]
        examples = examples_of(texts, tmp_path)
        losses = our_losses(handle, kind, examples, family.kinds)
        assert_all_run_without_a_gradient(losses["reference"] + losses["fast"], times=2)
        stock = stock_loss(handle, kind, texts, examples).item()
        assert [loss.item() for loss in losses.values()] == pytest.approx([stock, stock], rel=1e-6)

        # The fast path leaves such examples out, and runs an empty micro batch in their place.
        collator = Collator(tiny.processor(kind), family, handle.reducer, kinds=family.kinds)
        nothing = fast_loss(family, collator, [], prefix=[7, 8])
        assert nothing == 0
        assert_all_run_without_a_gradient(nothing)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_half_precision_model_takes_its_pictures_in_its_own_precision(tmp_path, kind):
    model = frozen_but_the_projector(kind, torch.bfloat16)
    with vzip.attach(model, reducer=VISIONZIP) as handle:
        texts = [f"see: {text}" for text in texts_of(kind)]
        examples = examples_of(texts, tmp_path)
        stock = stock_loss(handle, kind, texts, examples).item()
        for loss in our_losses(handle, kind, examples).values():
            assert loss.dtype == torch.float32 and loss.item() == pytest.approx(stock, rel=1e-2)
            for gradient in projector_gradients(model, loss):
                assert gradient.dtype == torch.float32 and gradient.isfinite().all()
