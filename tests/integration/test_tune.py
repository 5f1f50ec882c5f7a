"""The recipe, from command line to run folder, on a tiny model: same results on any ranks, resume, refusals."""

import json
import signal
import subprocess
import time

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

import vzip
from scripts.report import CURVES, SPEED
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.commands import assert_same_run, command, environment, metrics, start, tune
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
    """A run on one process: the reference of the others."""
    tune([*settings, "name=plain"])
    return runs / "plain"


def test_run_folder(plain, tiny_folder):
    files = {path.name for path in plain.iterdir()}
    assert {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "manifest.json",
        "projector.safetensors",
        "meta.json",
    } <= files
    assert {"result.json", "kept_tokens_0.png"} <= files and "state" not in files
    rows = json.loads((plain / "result.json").read_text())["rows"]
    assert [(row["name"], row["num_visual_tokens"]) for row in rows] == [
        ("full", 16),
        ("free", 6),
        ("tuned", 6),
    ]
    assert all(set(row["metrics"]) == {"open", "yesno", "all"} for row in rows)
    tuned, base = load_file(plain / "projector.safetensors"), load_file(tiny_folder / "model.safetensors")
    assert len(tuned) == 4
    assert all(
        not torch.equal(value, base[name.replace("model.multi_modal", "multi_modal")])
        for name, value in tuned.items()
    )


@pytest.mark.parametrize(
    "ranks, cut",
    [(1, "engine=reference batch.micro=8"), (2, "engine=reference batch.micro=2"), (2, "batch.tokens=150")],
)
def test_same_losses_on_any_ranks_and_micro_batches(settings, runs, plain, ranks, cut):
    name = f"ranks{ranks}-{cut.split('=')[-1]}"
    tune([*settings, f"name={name}", *cut.split()], ranks=ranks)
    assert_same_run(runs / name, plain)


SHARED = "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
"""Small tensors are shared out as well, as a large model's are."""


@pytest.mark.parametrize(
    "zero, cut",
    [
        ("zero2", "batch.tokens=150"),
        ("zero3", "engine=reference batch.micro=1"),
        ("zero3_offload", f"batch.tokens=150 batch.recompute=true {SHARED}"),
    ],
)
def test_zero_stages_agree_also_where_a_rank_has_no_image(settings, runs, plain, zero, cut):
    # Micro batches of one row: the two text-only rows leave a rank without an image. Packed, an odd part is of nothing.
    tune([*settings, f"name={zero}", f"deepspeed={zero}", *cut.split()], ranks=2)
    assert_same_run(runs / zero, plain)


def test_zero_stages_agree_in_the_precision_of_real_models(settings, runs):
    """bf16's own mode of DeepSpeed would keep master weights in some stages and not in others."""
    found = {}
    for zero in ("zero0", "zero2"):
        tune(
            [
                *settings,
                f"name=bf16-{zero}",
                f"deepspeed={zero}",
                "model.dtype=bfloat16",
                "evaluate.questions=0",
            ],
            ranks=2,
        )
        found[zero] = [loss for _, loss, _ in metrics(runs / f"bf16-{zero}")]
    assert found["zero2"] == pytest.approx(found["zero0"], rel=2e-3) and len(set(found["zero0"])) == 3


def test_killed_run_resumes_to_the_same_bits(settings, runs):
    long = [*settings, "optim.max_steps=null", "optim.epochs=40", "save_every=5", "evaluate.questions=0"]
    tune([*long, "name=whole"])
    run = runs / "killed"
    process = subprocess.Popen(
        command([*long, "name=killed"]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and (not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 12):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / "state" / "latest").is_file() and not (run / "result.json").exists(), (
        "the run ended before the kill"
    )
    with pytest.raises(vzip.UserError, match="has not finished"):
        vzip.load(run)
    tune([*long, "name=killed"])
    assert metrics(run) == metrics(runs / "whole")
    assert (run / "projector.safetensors").read_bytes() == (
        runs / "whole" / "projector.safetensors"
    ).read_bytes()


def test_finished_run_does_nothing_until_fresh(settings, plain):
    before = {path: path.stat().st_mtime_ns for path in plain.iterdir()}
    done = tune([*settings, "name=plain"])
    assert "is finished" in done.stdout and "tuned" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in plain.iterdir()} == before
    other = start(command([*settings, "name=plain", "optim.lr=1e-4"]))
    assert other.returncode == 2 and "other settings (optim.lr=0.01 there, 0.0001 now)" in other.stderr
    assert "fresh=true" in other.stderr


def test_load_generates_and_refuses_strangers(plain, tmp_path):
    model, processor = vzip.load(plain)
    inputs = processor(
        images=[tiny.picture()], text="USER: <image>\nwhat is it? ASSISTANT:", return_tensors="pt"
    )
    assert (
        model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1]
        == inputs["input_ids"].shape[1] + 3
    )
    tuned = load_file(plain / "projector.safetensors")
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in tuned.items())

    stranger = tiny.save_llava(tmp_path / "stranger", seed=1)
    with pytest.raises(vzip.UserError, match="another base model"):
        vzip.load(plain, base=str(stranger))
    with pytest.raises(vzip.UserError, match="trained with the reducer"):
        vzip.load_projector(vzip.attach(tiny.llava(), budget=7), plain)


@pytest.mark.parametrize("mode", ["projector_lora", "language_lora"])
def test_lora_is_saved_in_pefts_format_and_loads(settings, runs, plain, mode):
    tune([*settings, f"tune={mode}", f"name={mode}", "evaluate.questions=0"])
    run = runs / mode
    assert PeftConfig.from_pretrained(str(run / "adapter")).r == 16
    tuned, before = load_file(run / "projector.safetensors"), load_file(plain / "projector.safetensors")
    assert set(tuned) == set(before)
    model, processor = vzip.load(run)
    lora = {name: value for name, value in model.named_parameters() if "lora_B" in name}
    where = "multi_modal_projector" if mode == "projector_lora" else "language_model"
    assert (
        lora and all(where in name for name in lora) and any(value.abs().sum() > 0 for value in lora.values())
    )
    inputs = processor(
        images=[tiny.picture()], text="USER: <image>\nwhat is it? ASSISTANT:", return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_control_adds_the_random_row(settings, runs):
    tune([*settings, "name=controlled", "control=true", "optim.max_steps=1"])
    rows = json.loads((runs / "controlled" / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full", "free", "tuned", "random"]
    assert json.loads((runs / "controlled-random" / "meta.json").read_text())["reducer"]["name"] == "random"


def test_wandb_offline_holds_the_run(settings, runs, tmp_path):
    """Without a key; read back from the file that `wandb sync` sends."""
    tune(
        [*settings, "name=tracked", "track=wandb", "optim.max_steps=2"],
        HOME=str(tmp_path),
        NETRC=str(tmp_path / "none"),
    )
    run = runs / "tracked"
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert (
        run / "result.json"
    ).stat().st_mtime_ns < file.stat().st_mtime_ns  # a lost network withholds no result
    found = list(records(file))
    history = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", *CURVES, *SPEED}  # what dashboard and report show
    for row, line in zip(history, lines, strict=True):
        assert {name: row[name] for name in line if name != "step"} == {
            n: v for n, v in line.items() if n != "step"
        }
    assert history[-1]["eval/scores/nrows"] == 3 and history[-1]["eval/answers/nrows"] == 12
    assert len(history[-1]["eval/kept_tokens/filenames"]) == 4
    results = json.loads((run / "result.json").read_text())["rows"]
    summary = {update.key: update.value_json for record in found for update in record.summary.update}
    for row in results:
        assert json.loads(summary[f"eval/{row['name']}_all"]) == row["metrics"]["all"]
    (projector,) = (record.artifact for record in found if record.artifact.type == "model")
    assert {entry.path for entry in projector.manifest.contents} == {
        "projector.safetensors",
        "meta.json",
        "config.yaml",
    }


def test_a_sweep_is_a_run_for_each_value(settings, runs):
    values = "hydra.sweeper.params={reducer.budget:'4,5'}"
    done = tune(
        [
            *settings,
            "+exp=sweep-budget",
            values,
            "model.name=swept",
            "optim.max_steps=1",
            "evaluate.questions=2",
        ]
    )
    folders = sorted(runs.glob("swept-*"))
    assert [json.loads((folder / "meta.json").read_text())["budget"] for folder in folders] == [4, 5]
    assert all(str(folder) in done.stdout for folder in folders)
    assert not (ROOT / "multirun").exists() and not (ROOT / "multirun.yaml").exists()


MISTAKES = {
    "mistyped name": (["optim.learning_rate=1"], "learning_rate"),
    "mistyped value": (["optim.lr=abc"], "optim.lr"),
    "unknown member": (["model=llava-8b"], "llava-8b"),
    "unknown reducer setting": (["reducer.bugdet=6"], "bugdet"),
    "budget too large": (["reducer.budget=99"], "reducer.budget=99"),
    "contradiction": (["reducer.dominant=4", "reducer.contextual=1"], "reducer.budget=5"),
    "batch": (["engine=reference", "batch.micro=3"], "batch.micro can be 1, 2, 4, 8"),
    "tokens": (["batch.tokens=10"], "batch.tokens=10 is less than"),
    "fraction": (["data.fraction=1.5"], "data.fraction=1.5"),
    "no data": (["data.path=/nowhere.json"], "/nowhere.json does not exist"),
    "no pictures": (["data.image_folder=/nowhere"], "missing"),
    "nothing to load": (["model.id=/nowhere/model"], "model.id=/nowhere/model"),
    "no projector": (["model.projector=/nowhere.safetensors"], "/nowhere.safetensors"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_a_message(settings, runs, mistake):
    changes, message = MISTAKES[mistake]
    done = start(command([*settings, *changes, "name=mistake"]), HF_HUB_OFFLINE="1")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (runs / "mistake").exists()


def test_broken_files_are_named(settings, tmp_path, data_folder):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": 1},\n {"id": 2,,}]')
    done = start(command([*settings, f"data.path={broken}"]))
    assert done.returncode == 2 and f"{broken}, line 2" in done.stderr and "Traceback" not in done.stderr


def test_one_bad_picture_in_many_is_reported_and_survived(settings, runs, tmp_path):
    tiny.save_data(tmp_path, 120, text_only=0)
    (tmp_path / "images" / "noise" / "train7.png").write_bytes(b"not a picture")
    files = [f"data.path={tmp_path}/train.json", f"data.image_folder={tmp_path}/images", "data.held_out=null"]
    done = tune([*settings, *files, "name=survived", "optim.max_steps=1"])
    assert "left out: row-7" in done.stdout
    manifest = json.loads((runs / "survived" / "manifest.json").read_text())
    assert manifest["num_rows"] == 119 and [row["id"] for row in manifest["bad_rows"]] == ["row-7"]


def test_missing_held_out_pictures_are_refused_before_training(settings, runs, tmp_path):
    held_out = tiny.save_data(tmp_path, 8, text_only=0, held_out=True)
    held_out.write_text(held_out.read_text().replace("noise/test", "gone/test"))
    done = start(command([*settings, f"data.held_out={held_out}", "name=blind"]))
    assert (
        done.returncode == 2 and "8 of 8 examples can't be used" in done.stderr and "Traceback" not in done.stderr
    )
    assert not (runs / "blind" / "metrics.jsonl").exists()


def test_dry_run_of_13b_needs_no_weights():
    done = start(["make", "tune", "MODEL=llava-13b", "ARGS=weights=random dry_run=true"])
    assert done.returncode == 0, done.stderr
    assert "31,467,520 trainable parameters in 4 tensors" in done.stdout
    assert "576 before, 64 after" in done.stdout
    assert "520 steps of 128 rows" in done.stdout
