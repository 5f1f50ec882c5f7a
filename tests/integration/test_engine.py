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
from data.batches.collate import Collator
from data.batches.dataset import BatchPlan, has_media
from data.examples.prepare import Selection, prepare
from data.examples.tokens import Examples
from tests.conftest import ROOT
from tests.helpers import tiny
from train import config
from train.batches import make_batches
from train.checkpoint import RunFolder
from train.engine import Engine
from train.losses import media_inputs
from train.ranks import init_distributed
from train.trainable import make_trainable
from vzip.families import family_of
from vzip.templates.encode import vicuna

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cfg(overrides):
    config.register()
    init_distributed()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("tune", [*overrides, "optim.max_grad_norm=0"])


@pytest.fixture(scope="module")
def examples(data_folder):
    subset = prepare(
        Selection(path=str(data_folder / "train.json"), image_folder=str(data_folder / "images"))
    )
    return subset.examples(vicuna(), tiny.tokenizer(), max_tokens=2048)


ENGINES = pytest.mark.parametrize("engine", ["reference", "fast"])


def engine_on(cfg, model, examples, *settings):
    """(engine, its micro batches, what collates) on a copy of the model, with a budget of 6; lines of `settings` go last."""
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(settings)))
    family = family_of(copy.deepcopy(model))
    handle = vzip.attach(family.model, budget=6)
    torch.manual_seed(0)  # of LoRA
    trainable = make_trainable(family, cfg.tune)
    plan = BatchPlan(size=cfg.batch.size, world_size=1, num_steps=4, seed=0)
    collate = Collator(tiny.processor(), family, handle.reducer)
    batches, loss = make_batches(cfg, family, trainable, [collate], examples, plan)
    return Engine(loss, trainable, cfg), batches, collate


def take_step(engine, batches, step, *, lr):
    """(loss, gradient norm) of a step."""
    parts = [batches[batches.first_index(step) + part] for part in range(batches.num_micro_batches(step))]
    labels = {"num_labels": batches.num_labels(step), "num_taught_labels": batches.num_grad_labels(step)}
    return engine.step(parts, lr=lr, **labels)


def digests(model, *, projector):
    return {
        name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
        for name, value in model.named_parameters()
        if ("projector" in name) == projector
    }


@ENGINES
def test_steps_move_the_projector_alone(cfg, examples, engine):
    engine, batches, _ = engine_on(cfg, tiny.llava(), examples, f"engine={engine}", "batch.tokens=400")
    model = engine.family.model
    frozen, tuned = digests(model, projector=False), digests(model, projector=True)
    for step in range(4):
        assert batches.num_micro_batches(step) > 1
        take_step(engine, batches, step, lr=1e-2)
    assert digests(model, projector=False) == frozen
    after = digests(model, projector=True)
    assert all(after[name] != tuned[name] for name in tuned)


def mixed_step(batches):
    """A step with rows that teach the projector, and with a row of text, which does not."""
    media = has_media(batches.batcher.examples)[batches.examples_by_step]
    return (media.any(dim=1) & ~media.all(dim=1)).nonzero()[0].item()


CUTS = [
    "engine=reference batch.micro=8",
    "engine=reference batch.micro=2",
    "engine=reference batch.micro=1",
    "engine=fast",
    "engine=fast batch.tokens=400",
    "engine=fast batch.tokens=400 batch.recompute=true",
]


@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_are_the_plain_models(cfg, examples, cut):
    model = tiny.llava()
    engine, batches, collate = engine_on(cfg, model, examples, *cut.split())
    before = {name: value.detach().clone() for name, value in engine.trainable.parameters.items()}
    step = mixed_step(batches)
    assert (batches.num_micro_batches(step) == 1) == (
        cut in ("engine=reference batch.micro=8", "engine=fast")
    )
    loss, norm = take_step(engine, batches, step, lr=0.0)
    assert all(torch.equal(value, before[name]) for name, value in engine.trainable.parameters.items())

    # The plain way: padded forwards of the stock model, its own mean over label tokens.
    vzip.attach(model, budget=6)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)

    def plain_loss(rows):
        whole = collate(rows)
        return model(
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            labels=whole.labels,
            **media_inputs(whole, "image", torch.float32),
        ).loss

    rows = [examples[row] for row in batches.examples_by_step[step].tolist()]
    plain_loss(rows).backward()  # all rows of the batch, those of text too
    gradients = [value.grad for value in model.model.multi_modal_projector.parameters()]
    assert loss == pytest.approx(
        plain_loss([row for row in rows if row.media]).item(), rel=1e-6
    )  # those that teach
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-5)


@ENGINES
def test_text_alone_is_a_step_of_zero_gradient(cfg, examples, engine):
    mixed = Examples.of([*(example for example in examples if not example.media), examples[-1]])
    engine, batches, _ = engine_on(
        cfg, tiny.llava(), mixed, f"engine={engine}", "batch.size=1", "batch.micro=1"
    )
    step = next(step for step in range(4) if not batches.num_grad_labels(step))
    assert batches[step].num_placeholders == {"image": 0} and batches.num_labels(step) > 0
    before = digests(engine.family.model, projector=True)
    assert take_step(engine, batches, step, lr=1e-2) == (0, 0)  # the loss is that of rows that teach
    assert digests(engine.family.model, projector=True) == before


def test_rows_without_a_picture_alone_are_refused(cfg, examples):
    with pytest.raises(vzip.UserError, match=r"no row of data\.path=.* the projector can learn nothing"):
        engine_on(cfg, tiny.llava(), [example for example in examples if not example.media])


def test_text_teaches_lora_in_the_language_model(cfg, examples):
    """All rows are run and count, whichever the engine."""
    lora = OmegaConf.merge(cfg, {"tune": OmegaConf.load(ROOT / "configs/tune/language_lora.yaml")})
    results = {}
    for cut in CUTS:
        engine, batches, _ = engine_on(lora, tiny.llava(), examples, *cut.split())
        step = mixed_step(batches)
        assert batches.num_grad_labels(step) == batches.num_labels(step)
        results[cut] = take_step(engine, batches, step, lr=0.0)
    assert all(found == pytest.approx(results[CUTS[0]], rel=1e-5) for found in results.values())


def test_a_disk_without_room_is_refused_before_training(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(50_000_000))
    run = RunFolder(OmegaConf.merge(cfg, {"runs": str(tmp_path), "name": "full"}), rank=0)
    with pytest.raises(vzip.UserError, match=r"50 MB free.*runs=\.\.\."):
        run.begin({}, num_trainable=1000, world_size=1)


def test_starting_over_deletes_a_run_where_it_begins_and_nothing_else(cfg, tmp_path):
    here = OmegaConf.merge(cfg, {"runs": str(tmp_path), "name": "mine"})
    over = OmegaConf.merge(here, {"fresh": True})
    RunFolder(here, rank=0).begin({"hash": "a"}, num_trainable=1, world_size=1)
    (tmp_path / "mine" / "result.json").write_text("{}")
    run = RunFolder(over, rank=0)
    assert run.result is None and (tmp_path / "mine" / "result.json").is_file()
    run.begin({"hash": "b"}, num_trainable=1, world_size=1)
    assert not (tmp_path / "mine" / "result.json").exists()
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text()) == {"hash": "b"}

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("It was")
    with pytest.raises(vzip.UserError, match=r"fresh=true: .*thesis is there and holds no run"):
        RunFolder(OmegaConf.merge(over, {"name": "thesis"}), rank=0)


def test_a_run_does_not_go_on_with_other_rows(cfg, tmp_path):
    here = OmegaConf.merge(cfg, {"runs": str(tmp_path), "name": "mine"})
    RunFolder(here, rank=0).begin({"hash": "a" * 64}, num_trainable=1, world_size=1)
    RunFolder(here, rank=0).begin({"hash": "a" * 64}, num_trainable=1, world_size=1)
    with pytest.raises(
        vzip.UserError, match=r"begun on other rows \(hash aaaaaaaaaaaa, now bbbbbbbbbbbb\).*fresh=true"
    ):
        RunFolder(here, rank=0).begin({"hash": "b" * 64}, num_trainable=1, world_size=1)
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["hash"] == "a" * 64
