"""Fixtures of the tests of scripts/demo."""

import pytest

from scripts.demo.main import open_model


@pytest.fixture(scope="module")
def model(tuned_run):
    return open_model(str(tuned_run), base=None, template=None, max_new_tokens=5)
