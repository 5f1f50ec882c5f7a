"""The LoRA of a run: only what a run writes is given to peft."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import vzip
from tests.helpers import damage
from tests.helpers.errors import refused
from tests.helpers.lora import save_lora_run
from tests.helpers.runs import attached, edit_meta, logits
from vzip.runs.meta import ADAPTER, ADAPTER_WEIGHTS

pytestmark = pytest.mark.slow

CONFIG = f"{ADAPTER}/adapter_config.json"
WEIGHTS = f"{ADAPTER}/{ADAPTER_WEIGHTS}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A finished run with LoRA in its language model. Tests share it, and must not change it."""
    return save_lora_run(tmp_path_factory.mktemp("runs") / "run", tiny_folder, "language_model")


@pytest.fixture
def run(finished, tmp_path):
    """A copy without sums, because a stranger would write the right ones."""
    folder = shutil.copytree(finished, tmp_path / "run")
    edit_meta(folder, lambda meta: meta.pop("sha256"))
    return folder


@pytest.fixture
def alarm():
    """Ends a test that hangs."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_lora_comes_back(run, tiny_folder):
    handle = attached(tiny_folder)
    without = logits(handle.family.model, handle.processor(vzip.load(run, device="cpu")[1]))
    assert not torch.allclose(logits(*vzip.load(run, device="cpu")), without, atol=1e-2)


# Each of these reaches peft today: an expression that explodes, other modules, other files, other code.
FOREIGN = {
    "a regular expression that explodes": {"target_modules": "(.*.*.*.*.*.*.*.*.*.*.*)*x"},
    "all layers": {"target_modules": "all-linear"},
    "a list": {"target_modules": ["q_proj"]},
    "a pattern of ranks that explodes": {"rank_pattern": {"(.*.*.*.*.*.*.*.*.*.*)*x": 8}},
    "a pattern of scales": {"alpha_pattern": {"q_proj": 100}},
    "layers left out by an expression": {"exclude_modules": "(.*.*.*.*.*.*.*.*.*)*x"},
    "saved modules": {"modules_to_save": ["lm_head"]},
    "another method": {"peft_type": "PREFIX_TUNING"},
    "code of Megatron": {"megatron_core": "os", "megatron_config": {"a": 1}},
    "an initialization from data": {"init_lora_weights": "eva"},
    "a setting of another version": {"brand_new": True},
    "another rank": {"r": 8},
    "a rank of all memory": {"r": 10**12},
    "no rank": {"r": "four"},
}


@pytest.mark.parametrize("changes", FOREIGN.values(), ids=FOREIGN)
def test_what_no_run_writes_is_refused(run, changes, alarm):
    edit(run / CONFIG, **changes)
    refused(vzip.load, run, device="cpu", words=[str(run / CONFIG), "copy the whole run again"])


def test_entries_without_effect_may_hold_anything(run):
    outside = {"base_model_name_or_path": "/etc/passwd", "revision": "../..", "auto_mapping": {"a": "os"}}
    edit(run / CONFIG, peft_version="99.0", brand_new=None, **outside)
    vzip.load(run, device="cpu")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"[" * 100_000])
def test_a_damaged_configuration_is_refused(run, content):
    (run / CONFIG).write_bytes(content)
    refused(vzip.load, run, device="cpu", words=[str(run / CONFIG)])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "projector.safetensors"])
def test_a_pipe_is_refused(run, name, alarm):
    """Opening it would wait for ever."""
    (run / name).unlink()
    os.mkfifo(run / name)
    refused(vzip.load, run, device="cpu", words=[name, "can't be read"])


def drop(tensors):
    del tensors[next(iter(tensors))]


def rename(tensors):
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)


def add_a_head(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def spoil(tensors):
    next(iter(tensors.values())).view(-1)[-1] = torch.nan


@pytest.mark.parametrize("change", [drop, rename, add_a_head, spoil, dict.clear])
def test_weights_that_are_not_this_models_lora_are_refused(run, change):
    tensors = {name: value.clone() for name, value in load_file(run / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, run / WEIGHTS)
    refused(vzip.load, run, device="cpu", words=[str(run / ADAPTER)])


@pytest.mark.parametrize("make_damage", [damage.cut, damage.empty, damage.write_html])
def test_damaged_weights_are_refused(run, make_damage):
    make_damage(run / WEIGHTS)
    refused(vzip.load, run, device="cpu", words=[str(run / WEIGHTS), "can't be read"])


def test_the_weights_have_a_sum(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    vzip.load(run, device="cpu")
    tensors = {name: value.clone() + 1 for name, value in load_file(run / WEIGHTS).items()}
    save_file(tensors, run / WEIGHTS)
    refused(vzip.load, run, device="cpu", words=[str(run / WEIGHTS), "sha256"])
