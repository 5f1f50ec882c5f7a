"""A training step against the plain model: same loss, same gradient, and only the projector moves."""

import copy
import hashlib

import pytest
import torch
from omegaconf import OmegaConf

import vzip
from data.batches.collate import Collator
from data.batches.dataset import BatchPlan, has_media
from data.examples.prepare import Selection, prepare
from data.examples.tokens import Examples
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.configs import composed
from tests.helpers.examples import micro_batches_of
from train.batches import make_batches
from train.engine import Engine
from train.loop import train_step
from train.ranks import init_distributed
from train.state import PARTS
from train.trainable import make_trainable
from vzip import UserError
from vzip.families import family_of
from vzip.templates.encode import vicuna

pytestmark = pytest.mark.slow

PATHS = ("reference", "fast")
CUTS = {
    "engine=reference batch.micro=8": 1,
    "engine=reference batch.micro=2": 4,
    "engine=reference batch.micro=1": 8,
    "engine=fast": 1,
    "engine=fast batch.tokens=400": 2,
    "engine=fast batch.tokens=400 batch.recompute=true": 2,
}
"""Ways to cut a step of 8 examples, with the least number of micro batches."""


@pytest.fixture(scope="module")
def cfg(overrides):
    init_distributed()
    return composed(*overrides, "optim.max_grad_norm=0", "optim.warmup=0")


@pytest.fixture(scope="module")
def examples(data_folder):
    selection = Selection(path=str(data_folder / "train.json"), image_folder=str(data_folder / "images"))
    return prepare(selection).examples(vicuna(), tiny.tokenizer(), max_tokens=2048)


class Trainer:
    """An engine on a copy of a model, with a budget of 6, and its micro batches. Dotted settings go last."""

    def __init__(self, cfg, model, examples, *settings):
        self.cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(settings)))
        self.family = family_of(copy.deepcopy(model))
        reducer = vzip.attach(self.family.model, budget=6).reducer
        torch.manual_seed(0)  # of LoRA
        trainable = make_trainable(self.family, self.cfg.tune)
        plan = BatchPlan(size=self.cfg.batch.size, world_size=1, num_steps=4, seed=0)
        self.collator = Collator(tiny.processor(), self.family, reducer)
        self.batches, loss = make_batches(self.cfg, self.family, trainable, [self.collator], examples, plan)
        self.engine = Engine(loss, trainable, self.cfg)

    def step(self, step):
        """(loss, gradient norm) of a step."""
        micro_batches = iter(micro_batches_of(self.batches, step))
        metrics = train_step(self.engine, self.batches, micro_batches, step, self.cfg)
        assert not list(micro_batches)
        return metrics["train/loss"], metrics["train/grad_norm"]

    def digests(self, *, projector):
        """Hashes of the projector's weights, or of all others."""
        hashes = {}
        for name, value in self.family.model.named_parameters():
            if ("projector" in name) == projector:
                hashes[name] = hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
        return hashes


def mixed_step(batches):
    """A step with examples that have a picture, and with one of text alone."""
    media = has_media(batches.batcher.examples)[batches.examples_by_step]
    return (media.any(dim=1) & ~media.all(dim=1)).nonzero()[0].item()


@pytest.mark.parametrize("path", PATHS)
def test_steps_move_the_projector_alone(cfg, examples, path):
    trainer = Trainer(cfg, tiny.llava(), examples, f"engine={path}", "batch.tokens=400")
    frozen = trainer.digests(projector=False)
    before = trainer.digests(projector=True)
    for step in range(4):
        assert trainer.batches.num_micro_batches(step) > 1
        trainer.step(step)
    assert trainer.digests(projector=False) == frozen
    after = trainer.digests(projector=True)
    assert all(after[name] != before[name] for name in before)


def test_numbers_that_are_not_finite_change_no_weight(cfg, examples):
    """Whether the loss or only its gradient is not finite."""
    trainer = Trainer(cfg, tiny.llava(), examples)
    before = trainer.digests(projector=True)
    weight = trainer.family.model.get_parameter("model.multi_modal_projector.linear_1.weight")
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match="the gradient norm is nan at step 0, before anything was tuned"):
        trainer.step(0)
    hook.remove()
    assert trainer.digests(projector=True) == before

    broken = tiny.llava()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    trainer = Trainer(cfg, broken, examples)
    with pytest.raises(UserError, match=r"the loss is nan at step 0.* because lm_head\.weight holds"):
        trainer.step(0)
    assert trainer.digests(projector=True) == before


@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_are_the_plain_models(cfg, examples, cut):
    model = tiny.llava()
    trainer = Trainer(cfg, model, examples, *cut.split(), "optim.lr=0")
    before = trainer.digests(projector=True)
    step = mixed_step(trainer.batches)
    assert trainer.batches.num_micro_batches(step) >= CUTS[cut]
    loss, norm = trainer.step(step)
    assert trainer.digests(projector=True) == before

    # Plain: padded forwards of the stock model, with its own mean over label tokens.
    vzip.attach(model, budget=6)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)

    def plain_loss(chosen):
        batch = trainer.collator(chosen)
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            **batch.media["image"].normalized(torch.float32).arguments,
        ).loss

    # The gradient is that of all examples, the reported loss that of those with a picture.
    of_step = [examples[number] for number in trainer.batches.examples_by_step[step].tolist()]
    plain_loss(of_step).backward()
    gradients = [parameter.grad for parameter in projector.parameters()]
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-5)
    with_picture = [example for example in of_step if example.media]
    assert loss == pytest.approx(plain_loss(with_picture).item(), rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_text_alone_is_a_step_of_zero_gradient(cfg, examples, path):
    texts = [example for example in examples if not example.media]
    mixed = Examples.of([*texts, examples[len(examples) - 1]])
    trainer = Trainer(cfg, tiny.llava(), mixed, f"engine={path}", "batch.size=1", "batch.micro=1")
    batches = trainer.batches
    step = next(step for step in range(4) if not batches.num_grad_labels(step))
    assert batches[step].num_placeholders == {"image": 0} and batches.num_labels(step) > 0

    before = trainer.digests(projector=True)
    assert trainer.step(step) == (0, 0)
    assert trainer.digests(projector=True) == before


def test_lora_in_the_language_model_learns_from_text_too(cfg, examples):
    """All examples are run and count, on both paths."""
    lora = OmegaConf.merge(cfg, {"tune": OmegaConf.load(ROOT / "configs/tune/language_lora.yaml")})
    results = []
    for cut in CUTS:
        trainer = Trainer(lora, tiny.llava(), examples, *cut.split(), "optim.lr=0")
        step = mixed_step(trainer.batches)
        assert trainer.batches.num_grad_labels(step) == trainer.batches.num_labels(step)
        results.append(trainer.step(step))
    assert all(result == pytest.approx(results[0], rel=1e-5) for result in results)


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3", "zero3_offload"])
def test_a_restored_state_goes_on_to_the_same_bits(cfg, examples, zero, monkeypatch):
    """Also into an engine that has gone another way before."""
    # ZeRO 3 replaces this function for good. The test gives it back, because others count what it keeps.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    in_stage = copy.deepcopy(cfg)
    in_stage.deepspeed = OmegaConf.load(ROOT / f"configs/deepspeed/{zero}.yaml")
    whole = Trainer(in_stage, tiny.llava(), examples, "optim.weight_decay=0.1")
    for part in ("exp_avg", "exp_avg_sq", "step"):
        assert not any(tensor.any() for tensor in whole.engine.gather(part).values())
    whole.step(0)
    states = {part: whole.engine.gather(part) for part in PARTS}
    assert all(steps == 1 for steps in states["step"].values())
    metrics = [whole.step(step) for step in (1, 2)]

    resumed = Trainer(in_stage, tiny.llava(), examples, "optim.weight_decay=0.1")
    resumed.step(3)
    for part, tensors in states.items():
        resumed.engine.restore(part, tensors)
        assert_same_bits(resumed.engine.gather(part), tensors)
    assert [resumed.step(step) for step in (1, 2)] == metrics
    for part in PARTS:
        assert_same_bits(resumed.engine.gather(part), whole.engine.gather(part))


def assert_same_bits(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name
