"""The recipe on every family, as users run it: mixed examples, ranks, ZeRO 3, loading what was tuned."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import vzip
from data.paths import data_dir
from tests.helpers import tiny
from tests.helpers.commands import assert_same_run, metrics, tune
from tests.helpers.original import save_original
from vzip.families import families, family_of

pytestmark = pytest.mark.integration

MODELS = {
    "next": "next-7b",
    "onevision": "onevision-0.5b",
    "video": "video-llava-7b",
    "mini-gemini": "mini-gemini-7b",
    "qwen2.5-vl": "qwen2.5-vl-3b",
    "internvl": "internvl3-1b",
}
LONGEST_EXAMPLE = {
    "next": 95,
    "onevision": 230,
    "video": 85,
    "mini-gemini": 50,
    "qwen2.5-vl": 120,
    "internvl": 90,
}
"""Packed tokens, with a few to spare."""


def settings_of(model, folder, data, runs):
    return [
        f"model={model}",
        f"model.id={folder}",
        "model.dtype=float32",
        "reducer.budget=null",
        "reducer.dominant=4",
        "reducer.contextual=2",
        f"data.path={data}/train.json",
        f"data.held_out={data}/train.json",
        f"data.image_folder={data}/images",
        "data.fraction=1.0",
        "data.num_workers=0",
        "optim.lr=1e-2",
        "optim.max_steps=3",
        "batch.size=4",
        "evaluate.questions=6",
        "evaluate.baselines=false",
        "track=none",
        f"runs={runs}",
    ]


def assert_only_the_projector_differs(model, base):
    projector = family_of(model).projector_names
    for name, value in base.state_dict().items():
        same = torch.equal(model.state_dict()[name], value)
        assert same != name.startswith(projector), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_family_is_tuned_alike_on_one_rank_and_sharded_and_loads(tmp_path, kind):
    """In the smallest micro batches under ZeRO 3, one rank has images, another a video, another
    nothing to run.
    """
    folder = tiny.save_llava(tmp_path / "model", kind)
    tiny.save_mixed_data(tmp_path, kind)
    runs = tmp_path / "runs"
    settings = settings_of(MODELS[kind], folder, tmp_path, runs)
    sharded = [f"batch.tokens={LONGEST_EXAMPLE[kind]}", "deepspeed=zero3"]
    if kind in (*tiny.NATIVE, *tiny.SHUFFLED):
        settings.append("model.template._target_=vzip.templates.chatml")  # the tokenizer has `<image>`
    if kind == "next":
        settings.append("reducer.anyres=spatial")  # with image_newline, which ZeRO 3 shards
        sharded.append("evaluate.baselines=true")  # with all tokens

    tune([*settings, "engine=reference", "batch.micro=2", "name=plain"])
    tune([*settings, *sharded, "name=zero3"], ranks=2)
    assert_same_run(runs / "zero3", runs / "plain")

    base = families()[tiny.KINDS[kind][0]].load_model(str(folder), dtype=torch.float32)
    model, processor = vzip.load(runs / "plain")
    assert_only_the_projector_differs(model, base)
    texts = ["USER: <image>\nwhat? ASSISTANT:", "USER: <image>\nwhat is there? ASSISTANT:"]
    pictures = [[tiny.picture(0, 40, 90)], [tiny.picture(1)]]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_folder_of_llavas_own_code_is_tuned_and_loads(tmp_path):
    folder = save_original(tmp_path / "llava-v1.5-tiny", tiny.llava())
    tiny.save_mixed_data(tmp_path, "clip")
    tune([*settings_of("llava-7b", folder, tmp_path, tmp_path / "runs"), "name=own"])
    model, _ = vzip.load(tmp_path / "runs" / "own")
    assert_only_the_projector_differs(model, families()["llava"].load_model(str(folder), dtype=torch.float32))


@pytest.fixture
def prepared():
    if not (data_dir() / "tiny" / "prepared.json").is_file():
        pytest.skip("the tiny models are not prepared; run `make data`")


def test_the_papers_experiment_runs_on_a_tiny_model_and_two_ranks(prepared, tmp_path):
    settings = ["model=next-tiny", "reducer.budget=40", f"runs={tmp_path}", "name=next", "track=none"]
    done = tune(["+exp=next", *settings], ranks=2)
    rows = json.loads((tmp_path / "next" / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full", "free", "tuned"] and "TRAINABLE" in done.stdout
    losses = [loss for _, loss, _ in metrics(tmp_path / "next")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert set(load_file(tmp_path / "next" / "projector.safetensors")) == {
        f"model.multi_modal_projector.linear_{layer}.{name}"
        for layer in (1, 2)
        for name in ("weight", "bias")
    }


def test_tiny_models_know_their_placeholders(prepared):
    for folder in (data_dir() / "tiny").glob("*-tiny"):
        assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["<image>", "<video>"]) == [16, 15]
