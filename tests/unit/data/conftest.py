"""Fixtures of the tests of data."""

import pytest


@pytest.fixture(autouse=True)
def _own_folder_and_network(tmp_path, monkeypatch):
    """What a test prepares goes into a folder of its own, and servers on this machine are reached
    without a proxy.
    """
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "vzip"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
