"""The benchmark of the data loader at a minimal size."""

import json

import pytest

from scripts.bench import loader as bench_loader


@pytest.mark.slow
def test_the_command_measures_prints_and_writes(monkeypatch, call, tmp_path):
    monkeypatch.setattr(bench_loader, "SIZES", {(60, 80): 2})
    path = tmp_path / "loader.json"
    options = ["--model", "llava", "--workers", 1, "--seconds", 0.1, "--rounds", 2, "--json", path]
    printed = call(bench_loader.main, *options)

    figures = json.loads(path.read_text())["llava"]
    rates = figures["rates"]["1"]
    assert len(rates) == 2 and min(rates) > 0
    assert f"{sum(rates) / 2:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})" in printed
    assert figures["rows"] == sum(map(len, bench_loader.recorded_lengths()))
    assert figures["bytes_float32"] == 4 * figures["bytes_uint8"] == 4 * 3 * 336 * 336
    assert 0 < figures["order_s"] < figures["first_batch_s"]
    assert 0 <= figures["padding_ordered"] <= figures["padding_drawn"] < 1
    assert min(figures[name] for name in figures if name.endswith("_ms")) > 0
