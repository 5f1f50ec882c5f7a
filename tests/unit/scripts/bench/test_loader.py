"""The benchmark of the data loader at a minimal size."""

import json

import numpy as np
import pytest

from scripts.bench import loader as bench_loader


@pytest.mark.slow
def test_the_command_measures_prints_and_writes(monkeypatch, call, tmp_path):
    lengths = np.full(40, 50), np.full(8, 60)
    monkeypatch.setattr(bench_loader, "recorded_lengths", lambda: lengths)
    monkeypatch.setattr(bench_loader, "SIZES", {(60, 80): 2})
    monkeypatch.setattr(bench_loader, "BATCH_SIZE", 16)
    path = tmp_path / "loader.json"
    options = ["--model", "llava", "--workers", 1, "--seconds", 0.1, "--rounds", 2, "--json", path]

    # Two batches are taken before the timing, and an epoch has three.
    monkeypatch.setattr(bench_loader, "pictures_per_s", lambda *args, **kwargs: [100.0, 120.0])
    printed = call(bench_loader.main, *options)

    figures = json.loads(path.read_text())["llava"]
    assert figures["rates"] == {"1": [100.0, 120.0]}
    assert figures["rows"] == 48
    assert figures["bytes_float32"] == 4 * figures["bytes_uint8"] == 4 * 3 * 336 * 336
    assert 0 < figures["order_s"] < figures["first_batch_s"]
    assert 0 <= figures["padding_ordered"] <= figures["padding_drawn"] < 1
    assert min(figures[name] for name in figures if name.endswith("_ms")) > 0
    assert "110 (100 to 120); 110 a worker" in printed


@pytest.mark.slow
def test_the_recorded_mix_is_loaded_by_a_worker(monkeypatch, call, tmp_path):
    monkeypatch.setattr(bench_loader, "SIZES", {(60, 80): 2})
    path = tmp_path / "loader.json"
    call(
        bench_loader.main, "--model", "llava", "--workers", 1, "--seconds", 0.1, "--rounds", 2, "--json", path
    )

    figures = json.loads(path.read_text())["llava"]
    assert figures["rows"] == sum(map(len, bench_loader.recorded_lengths()))
    assert min(figures["rates"]["1"]) > 0
