"""Fixtures that several tiers share."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from data.paths import data_dir
from tests.helpers import tiny
from tests.helpers.pieces import save_sentencepiece_model

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

# `make check` draws few cases for each property, `make test` more. No case has a deadline: machines differ.
settings.register_profile("quick", max_examples=10, deadline=None)
settings.register_profile("full", max_examples=50, deadline=None)
settings.load_profile("full")


@pytest.fixture(scope="session", autouse=True)
def _own_data_dir(tmp_path_factory):
    """What the tests prepare goes into a folder of theirs, in which the prepared models are seen."""
    folder, real = tmp_path_factory.mktemp("vzip-data"), data_dir()
    for name in ("smol", "tiny"):
        (folder / name).symlink_to(real / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VZIP_DATA", str(folder))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A folder with `tokenizer.model`, a small SentencePiece model like LLaMA's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny LLaVA on disk: 16 patches of 14 px, CLIP tower, byte tokenizer."""
    return tiny.save_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """train.json (24 rows, 2 of them text-only), test.json (8 questions) and images/, all noise."""
    folder = tmp_path_factory.mktemp("noise")
    tiny.save_data(folder)
    tiny.save_data(folder, 8, text_only=0, held_out=True, seed=1)
    return folder


@pytest.fixture(scope="session")
def overrides(tiny_folder, data_folder):
    """Command-line overrides that run the recipe on the tiny model and data, in float32, on one CPU."""
    return [
        "model=llava-7b",
        f"model.id={tiny_folder}",
        "model.name=tiny",
        "model.dtype=float32",
        "model.budget=6",
        f"data.path={data_folder}/train.json",
        f"data.held_out={data_folder}/test.json",
        f"data.image_folder={data_folder}/images",
        "data.fraction=1.0",
        "data.num_workers=0",
        "optim.lr=1e-2",
        "optim.max_steps=4",
        "batch.size=8",
        "batch.micro=4",
        "evaluate.questions=8",
        "track=none",
    ]
