"""The recipe, from command line to run folder, on a tiny model: same results on any ranks, refusals."""

import json

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

import vzip
from scripts.report import CURVES, SPEED
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.commands import assert_same_run, command, metrics, start, tune
from tests.helpers.wandb_file import records

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(overrides, runs):
    return [*overrides, f"runs={runs}"]


@pytest.fixture(scope="module")
def plain(settings, runs):
    """A run on one process, which the others are compared with."""
    tune([*settings, "name=plain"])
    return runs / "plain"


def rows_of(run):
    return json.loads((run / "result.json").read_text())["rows"]


def assert_generates(model, processor):
    inputs = processor(
        images=[tiny.picture()], text="USER: <image>\nwhat is it? ASSISTANT:", return_tensors="pt"
    )
    num_tokens = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert output.shape[1] == num_tokens + 3


def test_a_run_folder_is_complete(plain, tiny_folder):
    files = {path.name for path in plain.iterdir()}
    assert files == {
        *("config.yaml", "env.json", "manifest.json", "metrics.jsonl"),
        *("projector.safetensors", "meta.json", "result.json"),
        *(f"answers_{setting}.json" for setting in ("full", "free", "tuned")),
        *(f"kept_tokens_{number}.png" for number in range(4)),
    }
    rows = rows_of(plain)
    counts = [(row["name"], row["num_visual_tokens"]) for row in rows]
    assert counts == [("full", 16), ("free", 6), ("tuned", 6)]
    assert all(set(row["metrics"]) == {"open", "yesno", "all"} for row in rows)

    tuned = load_file(plain / "projector.safetensors")
    base = load_file(tiny_folder / "model.safetensors")
    assert len(tuned) == 4
    for name, value in tuned.items():
        assert not torch.equal(value, base[name.replace("model.multi_modal", "multi_modal")])


SHARED = "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
"""Small tensors are shared out as well, as those of a large model are."""
SPLITS = {  # (ranks, settings)
    "padded": (1, "engine=reference batch.micro=8"),
    "padded-2": (2, "engine=reference batch.micro=2"),
    "packed-zero2": (2, "deepspeed=zero2 batch.tokens=150"),
    "padded-zero3": (2, "deepspeed=zero3 engine=reference batch.micro=1"),
    "packed-zero3_offload": (2, f"deepspeed=zero3_offload batch.tokens=150 batch.recompute=true {SHARED}"),
}


@pytest.mark.parametrize("split", SPLITS)
def test_same_losses_however_a_step_is_split(settings, runs, plain, split):
    # In micro batches of one example, those of text leave a rank without an image. Packed, the last
    # one is empty.
    ranks, changes = SPLITS[split]
    tune([*settings, f"name={split}", *changes.split()], ranks=ranks)
    assert_same_run(runs / split, plain)


def test_zero_stages_agree_in_the_precision_of_real_models(settings, runs):
    """DeepSpeed's own bf16 mode would keep master weights in some stages and not in others."""
    curves = {}
    for zero in ("zero0", "zero2"):
        name = f"bf16-{zero}"
        changes = [f"deepspeed={zero}", "model.dtype=bfloat16", "evaluate.questions=0"]
        tune([*settings, f"name={name}", *changes], ranks=2)
        curves[zero] = [loss for _, loss, _ in metrics(runs / name)]
    assert curves["zero2"] == pytest.approx(curves["zero0"], rel=2e-3) and len(set(curves["zero0"])) == 3


def test_a_finished_run_does_nothing(settings, plain):
    before = {path: path.stat().st_mtime_ns for path in plain.iterdir()}
    done = tune([*settings, "name=plain"])
    assert "is finished" in done.stdout and "tuned" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in plain.iterdir()} == before


def test_a_run_loads_and_refuses_other_models(plain, tmp_path):
    model, processor = vzip.load(plain)
    assert_generates(model, processor)
    for name, value in load_file(plain / "projector.safetensors").items():
        assert torch.equal(model.get_parameter(name), value)

    stranger = tiny.save_llava(tmp_path / "stranger", seed=1)
    with pytest.raises(vzip.UserError, match="another base model"):
        vzip.load(plain, base=str(stranger))
    with pytest.raises(vzip.UserError, match="trained with the reducer"):
        vzip.load_projector(vzip.attach(tiny.llava(), budget=7), plain)


@pytest.mark.parametrize(
    ("mode", "part"), [("projector_lora", "multi_modal_projector"), ("language_lora", "language_model")]
)
def test_lora_is_saved_in_pefts_format_and_loads(settings, runs, plain, mode, part):
    tune([*settings, f"tune={mode}", f"name={mode}", "evaluate.questions=0"])
    run = runs / mode
    assert PeftConfig.from_pretrained(str(run / "adapter")).r == 16
    assert set(load_file(run / "projector.safetensors")) == set(load_file(plain / "projector.safetensors"))

    model, processor = vzip.load(run)
    lora = {name: value for name, value in model.named_parameters() if "lora_B" in name}
    assert lora and all(part in name for name in lora)
    assert any(value.any() for value in lora.values())
    assert_generates(model, processor)


def test_the_control_adds_the_random_setting(settings, runs):
    controlled = [*settings, "name=controlled", "control=true", "optim.max_steps=1"]
    tune(controlled)
    rows = rows_of(runs / "controlled")
    assert [row["name"] for row in rows] == ["full", "free", "tuned", "random"]
    meta = json.loads((runs / "controlled-random" / "meta.json").read_text())
    assert meta["reducer"]["name"] == "random"

    # A run that was stopped before its control goes on with it.
    result = runs / "controlled" / "result.json"
    complete = result.read_text()
    result.write_text(json.dumps({**json.loads(complete), "rows": rows[:3]}, indent=2))
    tune(controlled)
    assert json.loads(result.read_text()) == json.loads(complete)


def test_wandb_offline_holds_the_run(settings, runs, tmp_path):
    """Without a key. Read back from the file that `wandb sync` sends."""
    hidden = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    tune([*settings, "name=tracked", "track=wandb", "track.media=true", "optim.max_steps=2"], **hidden)
    run = runs / "tracked"
    (file,) = run.glob("wandb/offline-run-*/*.wandb")

    # A network that is lost at the end withholds no result.
    assert (run / "result.json").stat().st_mtime_ns < file.stat().st_mtime_ns

    history = []
    summary = {}
    projectors = []
    for record in records(file):
        if record.HasField("history"):
            items = record.history.item
            history.append({"/".join(item.nested_key): json.loads(item.value_json) for item in items})
        summary |= {update.key: json.loads(update.value_json) for update in record.summary.update}
        if record.artifact.type == "model":
            projectors.append({entry.path for entry in record.artifact.manifest.contents})

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", *CURVES, *SPEED}  # what dashboard and report show
    for entry, line in zip(history, lines, strict=True):
        del line["step"]
        assert {name: entry[name] for name in line} == line

    assert history[-1]["eval/scores/nrows"] == 3 and history[-1]["eval/answers/nrows"] == 12
    assert len(history[-1]["eval/kept_tokens/filenames"]) == 4
    for row in rows_of(run):
        assert summary[f"eval/{row['name']}_all"] == row["metrics"]["all"]
    assert projectors == [{"projector.safetensors", "meta.json", "config.yaml"}]


def test_a_sweep_is_a_run_for_each_value(settings, runs):
    values = "hydra.sweeper.params={reducer.budget:'4,5'}"
    changes = ["+exp=sweep-budget", values, "model.name=swept", "optim.max_steps=1", "evaluate.questions=2"]
    done = tune([*settings, *changes])
    folders = sorted(runs.glob("swept-*"))
    assert [json.loads((folder / "meta.json").read_text())["budget"] for folder in folders] == [4, 5]
    assert all(str(folder) in done.stdout for folder in folders)
    assert not (ROOT / "multirun").exists() and not (ROOT / "multirun.yaml").exists()


MISTAKES = {
    "mistyped name": (["optim.learning_rate=1"], "learning_rate"),
    "budget too large": (["reducer.budget=99"], "reducer.budget=99"),
    "no pictures": (["data.image_folder=/nowhere"], "missing"),
    "nothing to load": (["model.id=/nowhere/model"], "model.id=/nowhere/model"),
}
"""One for each stage: composing the settings, building from them, the data, the model."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_a_message(settings, runs, mistake):
    changes, message = MISTAKES[mistake]
    done = start(command([*settings, *changes, "name=mistake"]), HF_HUB_OFFLINE="1")
    shown = done.stdout + done.stderr
    assert done.returncode != 0 and message in shown and "Traceback" not in shown
    assert not (runs / "mistake").exists()


def test_missing_held_out_pictures_are_refused_before_training(settings, runs, tmp_path):
    held_out = tiny.save_data(tmp_path, 8, text_only=0, held_out=True)
    held_out.write_text(held_out.read_text().replace("noise/test", "gone/test"))
    done = start(command([*settings, f"data.held_out={held_out}", "name=blind"]))
    assert done.returncode == 2 and "8 of 8" in done.stderr and "Traceback" not in done.stderr
    assert not (runs / "blind" / "metrics.jsonl").exists()


def test_a_dry_run_of_13b_needs_no_weights():
    done = start(["make", "tune", "MODEL=llava-13b", "ARGS=weights=random dry_run=true"])
    assert done.returncode == 0, done.stderr
    assert "31,467,520 trainable parameters in 4 tensors" in done.stdout
    assert "576 before, 64 after" in done.stdout
    assert "520 steps of 128 examples" in done.stdout
