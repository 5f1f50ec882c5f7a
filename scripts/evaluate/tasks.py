"""The paper's tasks in lmms-eval: how they are scored, and the scores that the paper reports."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = "vzip_held_out"
"""The task of held-out questions, which needs no network."""
PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class PaperTask:
    """One column of the paper's tables, as lmms-eval measures it."""

    column: str
    """Name of the column."""
    name: str
    """Name of the task in lmms-eval."""
    metrics: tuple[str, ...]
    """Metrics of lmms-eval whose sum is the score."""
    scale: float = 100.0
    """Factor that turns the sum into points."""
    key: str | None = None
    """Environment variable with the key of the service that judges the answers.

    None if the task needs no judge.
    """


PAPER = (
    PaperTask("GQA", "gqa", ("exact_match",)),
    # The static variant compares the letter of the answer, so it needs no judge.
    PaperTask("MMB", "mmbench_en_dev_static", ("gpt_eval_score",), scale=1.0),
    PaperTask("MME", "mme", ("mme_perception_score", "mme_cognition_score"), scale=1.0),
    PaperTask("POPE", "pope", ("pope_f1_score",)),
    PaperTask("SQA", "scienceqa_img", ("exact_match",)),
    # The paper sent its answers to the challenge's server (test-dev), which no harness can ask.
    PaperTask("VQAv2", "vqav2_val", ("exact_match",)),
    # The paper's prompts also list the words that an OCR read in the picture
    # (llava_textvqa_val_v051_ocr.jsonl). lmms-eval leaves them out.
    PaperTask("TextVQA", "textvqa_val", ("exact_match",)),
    PaperTask("MMMU", "mmmu_val", ("mmmu_acc",)),
    PaperTask("SEED", "seedbench", ("seed_all",)),
    PaperTask("MMVet", "mmvet", ("gpt_eval_score",), scale=1.0, key="OPENAI_API_KEY"),
)
BY_NAME = {task.name: task for task in PAPER}


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one task by name, without standard errors and other entries."""
    metrics = {}
    for entry, value in results.items():
        # lmms-eval calls a metric "NAME,FILTER". Other entries, such as "alias", are not metrics.
        name, comma, _ = entry.partition(",")
        is_error = name.endswith(("_stderr", "_clt"))
        if comma and not is_error and isinstance(value, int | float):
            metrics[name] = float(value)

    return metrics


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Turn lmms-eval's results, by task, into scores by column of the table.

    Scores are points, except for MME, which is a sum. The numbers of tasks that are not the
    paper's are not scaled.
    """
    scores = {}
    for name, entries in results.items():
        metrics = _metrics(entries)

        if name in BY_NAME:
            task = BY_NAME[name]
            # If a metric is missing, the sum would be another score under the same name.
            if set(task.metrics) <= set(metrics):
                scores[task.column] = task.scale * sum(metrics[metric] for metric in task.metrics)
        elif name == HELD_OUT:
            for kind, share in metrics.items():
                scores[f"held out: {kind}"] = 100 * share
        else:
            # The scale of other tasks is not known, so their numbers stay.
            for metric, value in metrics.items():
                scores[f"{name}: {metric}"] = value

    return scores


def published_settings(names: Sequence[str | None]) -> list[dict[str, Any]]:
    """Return the settings that the paper reports for a model. Empty if it does not report it.

    Args:
        names: possible names of the model: the name of its recipe, or an id on the hub.
    """
    models = json.loads(PUBLISHED.read_text())["models"]
    for recipe, model in models.items():
        known_names = {recipe, *model["ids"]}
        if known_names & set(names):
            settings: list[dict[str, Any]] = model["rows"]
            return settings

    return []
