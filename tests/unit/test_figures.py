"""The numbers of the figures, against plain references; and figures that are drawn from any model, or refused with a reason."""

import argparse
import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from scripts.figures import charts
from scripts.figures import main as figures
from scripts.figures.attention import (
    SMALLEST,
    LayerAttention,
    attention_of_layers,
    num_holding,
    softmax_gradient,
    top_shares,
)
from scripts.figures.scores import comparable_scores, same_but_budget, without_a_part
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import attached, save_run
from vzip.families import family_of
from vzip.overlay import first_tile
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip, split_budget
from vzip.runs.projector import fingerprint, projector_meta
from vzip.tap import MAX_SCORES


def layers_of(kind):
    """(attention of all layers, eager attention maps of all layers [B, H, N, N]) of a tiny tower."""
    family, pixels = family_of(tiny.llava(kind)), torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    eager = copy.deepcopy(family.tower)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager(pixels, output_attentions=True).attentions
    return attention_of_layers(family, pixels), maps


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
@torch.no_grad()
def test_the_attention_of_every_layer_is_an_eager_towers(kind):
    layers, maps = layers_of(kind)
    assert len(layers) == tiny.LAYERS == len(maps)
    for layer, weights in zip(layers, maps, strict=True):
        received = weights.mean(dim=(1, 2)) if kind == "siglip" else weights[:, :, 0, 1:].mean(dim=1)
        torch.testing.assert_close(layer.shares(), received / received.sum(dim=1, keepdim=True))
        rows = weights if kind == "siglip" else weights[:, :, :1]
        torch.testing.assert_close(torch.cat(list(layer.rows())), rows.flatten(0, 2))
    assert not torch.allclose(layers[0].shares(), layers[1].shares(), rtol=0.1)


@torch.no_grad()
def test_rows_come_in_chunks_of_what_is_asked_for():
    layer = layers_of("siglip")[0][0]
    num_images, num_heads, num_tokens, _ = layer.keys.shape
    whole, parts = (
        torch.cat(list(layer.rows(MAX_SCORES))),
        list(layer.rows(3 * num_images * num_heads * num_tokens)),
    )
    assert {len(part) for part in parts[:-1]} == {3 * num_images * num_heads}
    torch.testing.assert_close(torch.cat(parts).sort(dim=0).values, whole.sort(dim=0).values)


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind not in tiny.TOWERS])
@torch.no_grad()
def test_every_familys_first_tile_is_looked_at(kind):
    family = family_of(tiny.llava(kind))
    tile = first_tile(family, tiny.processor(kind).image_processor, tiny.picture(height=40, width=90))
    assert tile.shape[:2] == (1, 3)
    layers = attention_of_layers(family, tile)
    assert len(layers) == tiny.LAYERS
    for layer in layers:
        assert layer.shares().shape == (1, tiny.GRID**2)
        torch.testing.assert_close(layer.shares().sum(), torch.tensor(1.0))


def test_shares_of_the_most_attended_patches():
    shares = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.1, 0.1]])
    assert top_shares(shares, [1, 2, 4]) == pytest.approx([(0.4 + 0.7) / 2, (0.7 + 0.8) / 2, 1])
    assert num_holding(shares, 0.5) == [2, 1]
    assert num_holding(shares, 0.75) == [3, 2]


def scored(scores):
    """A layer whose softmax rows have these scores: float[rows, N] as the queries' own coordinates."""
    width = scores.shape[1]
    queries = scores[None, None] * width**0.5
    return LayerAttention(queries=queries, keys=torch.eye(width)[None, None], has_cls=False)


def test_the_gradient_of_the_softmax_is_autograds():
    scores = 3 * torch.randn(20, 20)
    found = softmax_gradient([scored(scores)])
    rows = scores.softmax(dim=1)
    gradient = torch.stack(
        [torch.autograd.functional.jacobian(lambda z: z.softmax(0), row).diagonal() for row in scores]
    )
    assert found["num_rows"] == 20 and found["num_tokens"] == 20
    assert sum(part["weights"] for part in found["bins"]) == rows.numel()
    assert len(found["bins"]) > 5
    for part in found["bins"]:
        inside = (rows > part["from"] if part["from"] > 1.1 * SMALLEST else rows >= 0) & (rows <= part["to"])
        assert part["weights"] == inside.sum()
        assert part["mean_weight"] == pytest.approx(rows[inside].mean().item(), rel=1e-4)
        assert part["mean_gradient"] == pytest.approx(gradient[inside].mean().item(), rel=1e-4)
    most = rows.topk(2, dim=1).indices
    assert found["top_tenth"]["tokens"] == 2
    assert found["top_tenth"]["attention"] == pytest.approx(rows.gather(1, most).sum().item() / 20, rel=1e-4)
    assert found["top_tenth"]["gradient"] == pytest.approx(
        (gradient.gather(1, most).sum() / gradient.sum()).item(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (
            [0.4, 0.16, 0.8, 0.44],
            "broad in layer 2 (16 %), most concentrated in layer 3 (80 %), and broader again in the last",
        ),
        ([0.2, 0.5, 0.8], "broad in layer 1 (20 %), most concentrated in layer 3 (80 %)"),
        (
            [0.8, 0.5, 0.3],
            "Attention is most concentrated in layer 1 (80 %), and broader again in the last (30 %)",
        ),
        ([0.5, 0.52, 0.49], "about as concentrated in all layers (49 % to 52 %)"),
    ],
)
def test_a_title_says_what_is_seen(shares, words):
    title = charts.layers_seen(shares)
    assert words in title
    assert ("last" in title) == (shares[-1] < max(shares) / charts.CLEARLY)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0, 0, "stays at 0 %"),
        (45.4, 44.6, "stays at 45 %"),
        (45.4, 44.4, "falls from 45 to 44 %"),
        (44.4, 45.4, "rises from 44 to 45 %"),
    ],
)
def test_a_change_is_the_one_that_its_figures_show(before, after, words):
    assert charts.change_seen(before, after) == words


@pytest.mark.parametrize(
    ("has_cls", "whose"),
    [(True, "what CLS gives to the patches"), (False, "the attention that patches receive")],
)
def test_shares_are_of_what_patches_get(has_cls, whose):
    about = {
        "num_patches": 4,
        "num_layers": 1,
        "layer": 1,
        "has_cls": has_cls,
        "num_pictures": 1,
        "titled": 0,
    }
    picture = tiny.picture()
    maps = charts.draw_attention_maps(
        about | {"pictures": [{"holding_half": 2, "most": 0.3}]}, [(picture, picture)]
    )
    top = charts.draw_top_share(about | {"lines": [{"top": 1, "uniform": 0.25, "shares": [0.3]}]})
    budget = {"budget": 2, "dominant": 1, "contextual": 1, "attention": 0.3}
    kept = charts.draw_kept_tokens(about | {"budgets": [budget]}, [[picture, picture]])
    said = [maps.get_suptitle(), top.axes[0].get_ylabel(), kept.get_suptitle()]
    assert all(whose in text for text in said), said


SCORES = {"full": 0.9, "free": 0.5, "tuned": 0.8, "random": 0.6}


def score_in(row, reducer):
    """A control's `tuned` is its run's `random`."""
    return SCORES["random" if isinstance(reducer, Random) else row.split("-")[0]]


def finished_run(folder, base, reducer, *, seed=0, rows=("full", "free", "tuned"), others=(), **changes):
    """The files of a finished run that its comparison with others needs."""
    handle = attached(base, reducer=reducer)
    described = projector_meta(
        handle.family, reducer, *others, base=str(base), base_fingerprint=fingerprint(handle.family)
    )
    save_run(
        folder, handle, base, **{name: described[name] for name in ("budget", "reducer", "other_budgets")}
    )
    (folder / "config.yaml").write_text(
        OmegaConf.to_yaml({"data": {"held_out": "q.json"}, "evaluate": {"questions": 8}} | changes)
    )
    budget = reducer.num_tokens(16, has_cls=True, num_dropped=1)
    made = [
        {
            "name": name,
            "num_visual_tokens": 16
            if name == "full"
            else int(name.rsplit("-", 1)[1])
            if "-" in name
            else budget,
            "num_questions": 8,
            "metrics": {"all": score_in(name, reducer) + (seed / 100 if name.startswith("tuned") else 0)},
        }
        for name in rows
    ]
    (folder / "result.json").write_text(json.dumps({"rows": made, "seed": seed}))
    return folder


@pytest.fixture
def runs(tmp_path, tiny_folder):
    """The run `mine` of 6 tokens among others: of another seed, of 8 tokens, an ablation, random tokens, several budgets."""
    folder, mine = tmp_path / "runs", VisionZip(budget=6)
    finished_run(folder / "mine", tiny_folder, mine, rows=("full", "free", "tuned", "random"))
    finished_run(folder / "again", tiny_folder, mine, seed=1)
    finished_run(folder / "more", tiny_folder, VisionZip(budget=8))
    finished_run(folder / "without", tiny_folder, VisionZip(dominant=0, contextual=6))
    finished_run(folder / "average", tiny_folder, VisionZip(budget=6, merge="average"))
    finished_run(folder / "mine-random", tiny_folder, Random(budget=6), rows=("tuned",))
    elastic = ("full", "free-4", "free-6", "tuned-4", "tuned-6")
    finished_run(folder / "elastic", tiny_folder, VisionZip(budget=4), others=[mine], rows=elastic)
    return folder


def summary(scores):
    return sorted(
        (score.series, score.num_visual_tokens, score.seed) for score in scores if score.series != "full"
    )


def test_runs_that_can_be_compared_are_found_each_score_once(runs):
    scores = comparable_scores(runs / "mine")
    usual = same_but_budget(scores, VisionZip(budget=6))
    assert len([score for score in usual if score.series == "full"]) == 1
    assert summary(usual) == [
        ("elastic", 4, 0),
        ("elastic", 6, 0),
        ("free", 4, None),
        ("free", 6, None),
        ("free", 8, None),
        ("random", 6, 0),
        ("tuned", 6, 0),
        ("tuned", 6, 1),
        ("tuned", 8, 0),
    ]
    without = without_a_part(VisionZip(budget=6))["no dominant"]
    assert summary(score for score in scores if score.reducer == without) == [
        ("free", 6, None),
        ("tuned", 6, 0),
    ]


def test_runs_that_measured_something_else_are_left_out_or_refused(runs, tmp_path, tiny_folder):
    known = len(comparable_scores(runs / "mine"))
    reducer = VisionZip(budget=10)
    other_questions = finished_run(runs / "questions", tiny_folder, reducer, evaluate={"questions": 9})
    other_base = finished_run(runs / "base", tiny.save_llava(tmp_path / "other", seed=3), reducer)
    unfinished = finished_run(runs / "unfinished", tiny_folder, reducer)
    (unfinished / "result.json").unlink()
    assert len(comparable_scores(runs / "mine")) == known
    faster = finished_run(runs / "faster", tiny_folder, reducer, optim={"lr": 1.0})
    assert len(comparable_scores(runs / "mine")) == known
    assert len(comparable_scores(runs / "mine", [faster])) == known + 2  # free and tuned, as it is asked for
    refused(comparable_scores, runs / "mine", [other_questions], words=["--runs", "questions", "differ"])
    refused(comparable_scores, runs / "mine", [other_base], words=["--runs", "base", "differ"])
    refused(
        comparable_scores,
        runs / "mine",
        [unfinished],
        words=["unfinished", "has not finished", "result.json"],
    )
    refused(comparable_scores, unfinished, words=["has not finished"])


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": {"size": 64}},
        {"data": {"held_out": "q.json", "text_examples": False}},
        {"quantize": "nf4"},
        {"model": {"dtype": "x"}},
    ],
    ids=str,
)
def test_runs_tuned_in_another_way_are_no_seeds_of_a_run(runs, tiny_folder, changes):
    known = summary(comparable_scores(runs / "mine"))
    finished_run(runs / "other", tiny_folder, VisionZip(budget=6), seed=2, **changes)
    assert summary(comparable_scores(runs / "mine")) == known


def test_how_a_run_was_run_keeps_it_comparable(runs, tiny_folder):
    changes = {
        "control": True,
        "batch": {"size": 16, "tokens": 256},
        "data": {"held_out": "q.json", "cache": False},
        "save_every": 9,
    }
    for seed, given in enumerate(({"batch": {"size": 16, "tokens": None}}, changes), start=2):
        finished_run(runs / f"seed{seed}", tiny_folder, VisionZip(budget=6), seed=seed, **given)
    assert ("tuned", 6, 3) in summary(comparable_scores(runs / "seed2"))


def spoil(run, *, name, content):
    """The run with other bytes in one of its files."""
    (run / name).write_text(content)
    return run


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.json", '{"format": 99}'),
        ("result.json", '{"rows": ['),
        ("result.json", "[]"),
        ("config.yaml", "data: {a: ["),
        ("config.yaml", "- 1"),
    ],
)
def test_a_run_that_can_not_be_read_is_left_out_beside_another_and_refused_itself(
    runs, capsys, name, content
):
    broken, beside = (
        spoil(runs / "again", name=name, content=content),
        summary(comparable_scores(runs / "mine", [runs / "more"])),
    )
    assert ("tuned", 6, 1) not in beside and ("tuned", 6, 0) in beside
    assert f"{broken} is left out: " in capsys.readouterr().out
    refused(comparable_scores, broken, words=[str(broken)])
    refused(comparable_scores, runs / "mine", [broken], words=[str(broken)])


def subject_of(source, tmp_path, **more):
    """What the command draws, of its arguments; by default of one picture."""
    tiny.picture().save(tmp_path / "picture.png")
    given = {"pictures": [tmp_path / "picture.png"], "out": tmp_path / "out", "runs": [], "budgets": []}
    return figures.make_subject(argparse.Namespace(source=str(source), **given | more))


def read(folder, name):
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(2**24)) > 20
    return json.loads((folder / f"{name}.json").read_text())


def test_scores_over_budgets_are_drawn_from_runs_alone(runs, tmp_path, tiny_folder):
    finished_run(runs / "dominant", tiny_folder, VisionZip(dominant=6, contextual=0), rows=("full", "free"))
    subject = subject_of(runs / "mine", tmp_path)
    for name in ("recovery", "without-dominant"):
        figures.draw_figures(subject, name)
    points = read(subject.folder, "recovery")["points"]
    assert {(point["series"], point["num_visual_tokens"]) for point in points} >= {
        ("random", 6),
        ("tuned", 8),
        ("full", 16),
    }
    both, without, no_contextual = read(subject.folder, "without-dominant")["variants"]
    assert both["tuned"]["all"] == pytest.approx((0.8 + 0.81) / 2)  # the mean over seeds
    assert without == {
        "name": "no dominant",
        "dominant": 0,
        "contextual": 6,
        "free": {"all": 0.5},
        "tuned": {"all": 0.8},
    }
    assert (
        no_contextual["dominant"] == 6
        and no_contextual["free"] == {"all": 0.5}
        and no_contextual["tuned"] is None
    )


def test_a_run_of_another_split_than_the_papers_is_drawn_as_it_is(runs, tmp_path, tiny_folder):
    reducer = VisionZip(dominant=0, contextual=6)
    alone = finished_run(
        tmp_path / "alone" / "mine", tiny_folder, reducer, rows=("tuned",)
    )  # evaluate.baselines=false
    subject = subject_of(alone, tmp_path)
    for name in ("recovery", "kept-tokens"):
        figures.draw_figures(subject, name)
    assert [
        (point["series"], point["num_visual_tokens"]) for point in read(subject.folder, "recovery")["points"]
    ] == [("tuned", 6)]
    kept = {budget["budget"]: budget for budget in read(subject.folder, "kept-tokens")["budgets"]}
    assert (kept[6]["dominant"], kept[6]["contextual"]) == (0, 6)
    assert (kept[12]["dominant"], kept[12]["contextual"]) == split_budget(12)
    beside = same_but_budget(comparable_scores(runs / "without"), reducer)
    assert ("tuned", 6, 0) in summary(score for score in beside if score.reducer == reducer)


def test_recovery_without_a_score_is_refused(runs, tmp_path, monkeypatch):
    class Other:
        name = "other"

    (score, *_) = comparable_scores(runs / "mine")
    monkeypatch.setattr(figures, "comparable_scores", lambda *_: [replace(score, reducer=Other())])
    refused(
        figures.draw_figures,
        subject_of(runs / "mine", tmp_path),
        "recovery",
        words=["has no row of VisionZip", "--budgets"],
    )


def test_a_model_without_a_run_is_drawn_too(tmp_path, monkeypatch, capsys):
    source = tiny.save_llava(tmp_path / "model", "onevision")
    pictures = [tmp_path / "wide.png", tmp_path / "square.png"]
    tiny.picture(1, 40, 90).save(pictures[0])
    tiny.picture(2).save(pictures[1])
    given = ["--pictures", *map(str, pictures), "--budgets", "4", "9", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["figures.py", str(source), *given])
    figures.main.__wrapped__()
    printed = capsys.readouterr().out
    assert "recovery is left out" in printed and "only a finished run has" in printed
    maps, top, gradient, kept = (
        read(tmp_path / "out", name)
        for name in ("attention-maps", "top-share", "softmax-gradient", "kept-tokens")
    )
    assert not maps["has_cls"] and maps["layer"] == tiny.LAYERS - 1
    assert [len(picture["attention"]) for picture in maps["pictures"]] == [16, 16]
    assert [len(line["shares"]) for line in top["lines"]] == [tiny.LAYERS] * 4
    assert gradient["num_rows"] == 2 * 4 * 16 and gradient["num_tokens"] == 16  # pictures, heads, tokens
    assert [budget["budget"] for budget in kept["budgets"]] == [4, 9]
    assert 0 < kept["budgets"][0]["attention"] < kept["budgets"][1]["attention"] < 1
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json"] * 4 + [".png"] * 4


def test_bad_input_is_refused_with_what_to_do(runs, tmp_path, tiny_folder, monkeypatch):
    refused(subject_of, tiny_folder, tmp_path, pictures=[], words=["not a run folder", "--pictures", "--out"])
    refused(subject_of, tiny_folder, tmp_path, out=None, words=["--out"])
    (tmp_path / "text.png").write_text("no picture")
    refused(
        subject_of,
        tiny_folder,
        tmp_path,
        pictures=[tmp_path / "text.png"],
        words=["text.png", "can't be opened"],
    )
    (runs / "more" / "meta.json").unlink()
    refused(subject_of, runs / "more", tmp_path, words=["has not finished"])
    subject = subject_of(tiny_folder, tmp_path, budgets=[99])
    refused(figures.draw_figures, subject, "recovery", words=["only a finished run"])
    refused(figures.draw_figures, subject, "kept-tokens", words=["reducer.budget=99", "larger than"])
    assert not subject.folder.exists()  # nothing half-written
    subject = subject_of(tiny_folder, tmp_path, out=tmp_path / "text.png" / "x")
    refused(
        figures.draw_figures, subject, "attention-maps", words=["--out=", "text.png/x", "can't be written"]
    )
    monkeypatch.setattr(sys, "argv", ["figures.py", str(tiny_folder), "--figures", "histogram"])
    refused(figures.main.__wrapped__, words=["--figures histogram", "attention-maps", "recovery"])
