"""Runs compared without wandb, and what wandb is told to show."""

import json

import pytest
import yaml
from matplotlib import pyplot

from scripts.dashboard import make_report, make_workspace, specification
from scripts.report import BEGIN, CURVES, END, SPEED, block, draw_curves, main, read_runs, update
from tests.helpers.errors import refused

METRICS = [*CURVES, *SPEED]


def save_run(folder, name, *, tuned=0.9, finished=True):
    """Write what train/tune.py leaves, with a line of metrics that a kill has cut short."""
    path = folder / name
    path.mkdir(parents=True)
    config = {"model": {"name": "smol"}, "batch": {"size": 16}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    env = {
        "date": "2026-01-02",
        "commit": "0123456789",
        "modified_files": [],
        "command": ["/x/train/tune.py", "seed=3"],
        "packages": {"torch": "2.13.0"},
        "hardware": {"device": "a card", "num_cpus": 2, "world_size": 1},
    }
    (path / "env.json").write_text(json.dumps(env))
    lines = [{"step": step, **dict.fromkeys(METRICS, 1.5 - step)} for step in range(2)]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(whole + '{"step": 2, "trai')

    rows = []
    for setting, tokens, score in (("full", 576, 1.0), ("free", 64, 0.5), ("tuned", 64, tuned)):
        metrics = {"open": score, "all": 0.0}
        row = {"name": setting, "num_visual_tokens": tokens, "num_questions": 1200, "metrics": metrics}
        rows.append(row)
    if finished:
        result = {"rows": rows, "num_steps": 2, "manifest": "abcdef0123456789", "seed": 3}
        (path / "result.json").write_text(json.dumps(result))
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def blocks(folder):
    return {run.name: block(run) for run in read_runs(folder) if run.is_finished}


def test_a_block_says_what_was_run_and_its_scores(tmp_path):
    save_run(tmp_path, "one")
    assert blocks(tmp_path)["one"].splitlines() == [
        "### one",
        "",
        "`train/tune.py seed=3`: smol, seed 3, 2 steps of 16 examples in 2 s, loss 1.500 to 0.500; "
        "data abcdef012345. 1,200 questions. 2026-01-02, commit 0123456, 1 rank(s) on a card, 2 cores, "
        "torch 2.13.0.",
        "",
        "| setting | visual tokens | questions | open | all |",
        "| --- | --: | --: | --: | --: |",
        "| full | 576 | 1,200 | 1.000 | .000 |",
        "| free | 64 | 1,200 | .500 (50%) | .000 |",
        "| tuned | 64 | 1,200 | .900 (90%) | .000 |",
    ]

    # A source archive, and a machine without git, know no commit.
    edit(tmp_path / "one" / "env.json", commit=None)
    assert "2026-01-02, commit unknown, 1 rank(s)" in blocks(tmp_path)["one"]


def test_results_lose_nothing(tmp_path):
    """Text of a person stays, and so do blocks of runs that are gone; others are replaced."""
    save_run(tmp_path / "before", "gone")
    save_run(tmp_path / "before", "kept")
    first = update("# Results\n\nBy hand.\n", blocks(tmp_path / "before")) + "\n## Behind\n"
    save_run(tmp_path / "now", "kept", tuned=0.8)
    save_run(tmp_path / "now", "again")
    save_run(tmp_path / "now", "unfinished", finished=False)
    second = update(first, blocks(tmp_path / "now"))

    assert second.startswith("# Results\n\nBy hand.\n\n## Runs\n")
    assert second.endswith(f"{END}\n\n## Behind\n")
    headings = [line for line in second.splitlines() if line.startswith("###")]
    assert headings == ["### again", "### gone", "### kept"]
    assert second.count("| tuned | 64 | 1,200 | .900") == 2
    assert second.count("| tuned | 64 | 1,200 | .800") == 1
    assert update(second, blocks(tmp_path / "now")) == second

    refused(update, f"# Results\n{BEGIN}\n### one\n", {}, words=["but not"])


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"{", b"\xff", b"[" * 100_000, b'{"rows": [{"metrics": []}]}', b'{"rows": 1}'],
)
@pytest.mark.parametrize("name", ["env.json", "result.json", "config.yaml", "metrics.jsonl"])
def test_any_damaged_folder_is_left_out_by_name(tmp_path, capsys, name, content):
    save_run(tmp_path, "good")
    (save_run(tmp_path, "bad") / name).write_bytes(content + b"\n")
    (tmp_path / "something else").mkdir()
    assert [run.name for run in read_runs(tmp_path)] == ["good"]
    printed = capsys.readouterr().out
    assert "bad was left out" in printed and "1 of 2 folders" in printed
    refused(read_runs, tmp_path / "something else", words=["holds no run"])


@pytest.mark.parametrize("text", ["2026\n### other", f"2026 {END}", f"2026 {BEGIN}"])
def test_a_run_can_not_write_other_parts_of_the_report(tmp_path, capsys, text):
    save_run(tmp_path, "good")
    edit(save_run(tmp_path, "bad") / "env.json", date=text)
    assert [run.name for run in read_runs(tmp_path)] == ["good"]
    assert "holds texts that no run writes" in capsys.readouterr().out


def test_the_curves_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    for name in ("one", "two"):
        save_run(tmp_path, name, finished=False)
    draw_curves(read_runs(tmp_path), tmp_path / "made" / "report.png")
    assert (tmp_path / "made" / "report.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    monkeypatch.undo()
    pyplot.close(figure)

    assert [axis.get_title() for axis in figure.axes] == [*CURVES.values(), *SPEED.values()]
    for axis in figure.axes:
        lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        assert lines == {"one": [[0, 1.5], [1, 0.5]], "two": [[0, 1.5], [1, 0.5]]}


def test_files_are_written_into_new_folders_or_refused(tmp_path, call):
    name = r"$\nonsense{$ a;touch X;"
    save_run(tmp_path / "runs", name)
    results = tmp_path / "new" / "RESULTS.md"
    words = ["--runs", tmp_path / "runs", "--results", results]
    call(main, *words)
    assert f"### {name}" in results.read_text()
    assert (tmp_path / "runs" / "report.png").is_file()
    assert [path.name for path in results.parent.iterdir()] == ["RESULTS.md"]

    refused(
        call, main, *words, "--curves", results / "a.png", words=["--curves=", "can't be written", "exists"]
    )
    refused(call, main, *words, "--results", results / "x", words=["--results=", "can't be written"])
    results.write_bytes(b"\xff\xfe")
    refused(call, main, *words, words=[f"--results={results}", "UTF-8"])


def test_the_dashboard_is_specified_without_a_network():
    content = specification(make_workspace("team", "vzip"), make_report("team", "vzip"))
    assert json.loads(json.dumps(content)) == content
    results = ("tuned_all", "free-4_all", "tuned-64_all", "scores", "answers", "kept_tokens")
    for page in content.values():
        text = json.dumps(page)
        assert [name for name in METRICS if f'"{name}"' not in text] == []
        assert [name for name in results if f"eval/{name}" not in text] == []
