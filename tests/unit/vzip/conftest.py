"""Fixtures of the library's tests."""

import shutil

import pytest

from tests.helpers import tiny
from tests.helpers.original import save_original


@pytest.fixture(scope="session")
def _original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    save_original(folder / "llava", tiny.llava())
    return folder


@pytest.fixture
def original_folder(_original, tmp_path):
    """A checkpoint of LLaVA's own code, with its tower beside it, that the test may change."""
    shutil.copytree(_original, tmp_path, dirs_exist_ok=True)
    return tmp_path / "llava"
