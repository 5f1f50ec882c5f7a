"""The engine against the plain model: same loss, same gradients, nothing but the projector moves."""

import copy
import hashlib
import json
import shutil
from collections import namedtuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import vzip
from data.dataset import BatchPlan, Collator, MicroBatches
from data.prepare import Selection, prepare
from tests import tiny
from tests.conftest import ROOT
from train import config
from train.checkpoint import RunFolder
from train.engine import Engine, media_inputs
from train.ranks import init_distributed
from train.trainable import make_trainable
from vzip.families import family_of
from vzip.templates import vicuna

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cfg(overrides):
    config.register()
    init_distributed()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("tune", [*overrides, "optim.max_grad_norm=0"])


@pytest.fixture(scope="module")
def examples(data_folder):
    subset = prepare(Selection(path=str(data_folder / "train.json"), image_folder=str(data_folder / "images")))
    return list(subset.examples(vicuna(), tiny.tokenizer(), max_tokens=2048))


def engine_on(cfg, model, examples, *, micro, accumulation):
    """(engine, its micro batches) on a copy of the model, with a budget of 6."""
    family = family_of(copy.deepcopy(model))
    handle = vzip.attach(family.model, budget=6)
    trainable = make_trainable(family, cfg.tune)
    plan = BatchPlan(micro=micro, accumulation=accumulation, world_size=1, num_steps=4, seed=0)
    batches = MicroBatches(examples, Collator(tiny.processor(), family, handle.reducer), plan, rank=0)
    return Engine(family, trainable, cfg, accumulation=accumulation), batches


def digests(model, *, projector):
    return {
        name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
        for name, value in model.named_parameters()
        if ("projector" in name) == projector
    }


def test_steps_move_the_projector_alone(cfg, examples):
    engine, batches = engine_on(cfg, tiny.llava(), examples, micro=4, accumulation=2)
    model = engine.family.model
    frozen, tuned = digests(model, projector=False), digests(model, projector=True)
    for step in range(4):
        engine.step([batches[2 * step], batches[2 * step + 1]], lr=1e-2, num_labels=batches.num_labels(step))
    assert digests(model, projector=False) == frozen
    after = digests(model, projector=True)
    assert all(after[name] != tuned[name] for name in tuned)


@pytest.mark.parametrize("micro, accumulation", [(8, 1), (2, 4), (1, 8)])
def test_loss_and_gradient_are_the_plain_models(cfg, examples, micro, accumulation):
    model = tiny.llava()
    engine, batches = engine_on(cfg, model, examples, micro=micro, accumulation=accumulation)
    before = {name: value.detach().clone() for name, value in engine.trainable.parameters.items()}
    loss, norm = engine.step([batches[part] for part in range(accumulation)], lr=0.0, num_labels=batches.num_labels(0))
    assert all(torch.equal(value, before[name]) for name, value in engine.trainable.parameters.items())

    # The plain way: all rows of the batch in one padded forward of the stock model, its own mean over label tokens.
    whole = MicroBatches(
        examples, batches.collate, BatchPlan(micro=8, accumulation=1, world_size=1, num_steps=4, seed=0), rank=0
    )[0]
    vzip.attach(model, budget=6)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    output = model(
        input_ids=whole.input_ids,
        attention_mask=whole.attention_mask,
        labels=whole.labels,
        **media_inputs(whole, "image", torch.float32),
    )
    output.loss.backward()
    gradients = [value.grad for value in model.model.multi_modal_projector.parameters()]
    assert loss == pytest.approx(output.loss.item(), rel=1e-6)
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-5)


def test_text_alone_is_a_step_of_zero_gradient(cfg, examples):
    text = [example for example in examples if not example.media]
    engine, batches = engine_on(cfg, tiny.llava(), text, micro=2, accumulation=1)
    assert batches[0].num_placeholders == {"image": 0}
    before = digests(engine.family.model, projector=True)
    loss, norm = engine.step([batches[0]], lr=1e-2, num_labels=batches.num_labels(0))
    assert loss > 0 and norm == 0
    assert digests(engine.family.model, projector=True) == before


def test_a_disk_without_room_is_refused_before_training(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(50_000_000))
    run = RunFolder(OmegaConf.merge(cfg, {"runs": str(tmp_path), "name": "full"}), rank=0)
    with pytest.raises(vzip.UserError, match=r"50 MB free.*runs=\.\.\."):
        run.begin({}, num_trainable=1000, world_size=1)


def test_a_run_does_not_go_on_with_other_rows(cfg, tmp_path):
    here = OmegaConf.merge(cfg, {"runs": str(tmp_path), "name": "mine"})
    RunFolder(here, rank=0).begin({"hash": "a" * 64}, num_trainable=1, world_size=1)
    RunFolder(here, rank=0).begin({"hash": "a" * 64}, num_trainable=1, world_size=1)
    with pytest.raises(vzip.UserError, match=r"begun on other rows \(hash aaaaaaaaaaaa, now bbbbbbbbbbbb\).*fresh=true"):
        RunFolder(here, rank=0).begin({"hash": "b" * 64}, num_trainable=1, world_size=1)
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["hash"] == "a" * 64
