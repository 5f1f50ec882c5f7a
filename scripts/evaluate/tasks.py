"""The paper's tasks under lmms-eval's names, what their scores are, and what the paper reports."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK = "vzip_held_out"
"""The held-out questions, which need no network."""
FAILED = "failed"
"""File beside the harness' job with the number of the cell, from 1, that one of several processes failed in."""
PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class PaperTask:
    """A column of the paper's tables, as lmms-eval measures it."""

    column: str
    name: str
    metrics: tuple[str, ...]
    """Of lmms-eval; the column is their sum."""
    scale: float = 100.0
    """What makes points of it."""
    key: str | None = None
    """Environment variable of the service that judges the answers."""


PAPER = (
    PaperTask("GQA", "gqa", ("exact_match",)),
    # The answer's letter is compared, which needs no judge.
    PaperTask("MMB", "mmbench_en_dev_static", ("gpt_eval_score",), scale=1.0),
    PaperTask("MME", "mme", ("mme_perception_score", "mme_cognition_score"), scale=1.0),
    PaperTask("POPE", "pope", ("pope_f1_score",)),
    PaperTask("SQA", "scienceqa_img", ("exact_match",)),
    # The paper's answers went to the challenge's server (test-dev), which no harness can ask.
    PaperTask("VQAv2", "vqav2_val", ("exact_match",)),
    # The paper's questions have the tokens that an OCR read in the picture with them (llava_textvqa_val_v051_ocr.jsonl), which
    # lmms-eval leaves out.
    PaperTask("TextVQA", "textvqa_val", ("exact_match",)),
    PaperTask("MMMU", "mmmu_val", ("mmmu_acc",)),
    PaperTask("SEED", "seedbench", ("seed_all",)),
    PaperTask("MMVet", "mmvet", ("gpt_eval_score",), scale=1.0, key="OPENAI_API_KEY"),
)
BY_NAME = {task.name: task for task in PAPER}


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """lmms-eval's "metric,filter" entries of one task by metric, without standard errors and what is not a number."""
    named = ((entry.split(",")[0], value) for entry, value in results.items() if "," in entry)
    return {
        name: float(value)
        for name, value in named
        if isinstance(value, int | float) and not name.endswith(("_stderr", "_clt"))
    }


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Columns of the table, of what lmms-eval says of a task: points, but MME, which is a sum, and tasks that are not the
    paper's, whose numbers stay as they are.
    """
    scores = {}
    for name, entries in results.items():
        metrics = _metrics(entries)
        if name in BY_NAME:
            task = BY_NAME[name]
            if set(task.metrics) <= set(metrics):
                scores[task.column] = task.scale * sum(metrics[metric] for metric in task.metrics)
        elif name == TASK:
            scores |= {f"held out: {kind}": 100 * value for kind, value in metrics.items()}
        else:
            scores |= {f"{name}: {metric}": value for metric, value in metrics.items()}
    return scores


def published_rows(names: Sequence[str | None]) -> list[dict[str, Any]]:
    """The paper's rows of the model that has one of these names, a recipe's or an id; none of a model that it has not."""
    models = json.loads(PUBLISHED.read_text())["models"]
    return next((model["rows"] for name, model in models.items() if {name, *model["ids"]} & set(names)), [])
