"""Write the model card (README.md) of an export: use, scores, data, settings and licences."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import cached_file

from scripts.export.tag import TAG, card_metadata
from train.evaluation.tables import LEGEND, score_table
from train.runs import FinishedRun
from vzip.families import families
from vzip.runs.export import base_name
from vzip.runs.meta import reducers_of
from vzip.runs.schema import NUMBER, TEXT, WHOLE, check_entries

SHOWN_SETTINGS = ("reducer", "tune", "optim", "batch", "engine", "quantize", "seed")
CODE_LICENCE = "Apache-2.0"

_DATA = {"hash": TEXT, "num_rows": WHOLE, "fraction": NUMBER, "seed": WHOLE}
"""Entries about the data in meta.json, with their kinds."""


def base_licence(base: str) -> str | None:
    """Read the licence in the base model's own card. None if the card is missing or names none."""
    # The card is looked up like a file of the model: in its folder, or on the hub.
    try:
        return card_metadata(cached_file(base, "README.md")).get("license")
    except OSError:
        return None


def _eval_results(run: FinishedRun) -> list[EvalResult]:
    """List the scores of the tuned model for the hub to show."""
    results = []
    for row in run.scores:
        # The hub shows scores of the model in this repository, which is the tuned one.
        if not row["name"].startswith("tuned"):
            continue
        for kind, share in row["metrics"].items():
            result = EvalResult(
                task_type="visual-question-answering",
                dataset_type="held-out",
                dataset_name=f"{row['num_questions']:,} held-out questions",
                metric_type="accuracy",
                metric_name=f"{kind}, {row['num_visual_tokens']:g} visual tokens",
                metric_value=share,
            )
            results.append(result)
    return results


def _front_matter(run: FinishedRun, base: str, to: str) -> str:
    """Write the card's metadata."""
    # The base model must be a hub id, so a path is left out. The hub shows a name with scores only.
    results = _eval_results(run)
    metadata = ModelCardData(
        library_name="peft" if to == "peft" else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[TAG, "visionzip", "llava"],
        base_model=None if Path(base).is_dir() else base,
        license=base_licence(base),
        model_name=run.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{metadata.to_yaml()}\n---\n"


def _use_hf(meta: dict[str, Any]) -> str:
    """Explain how to load an export in the format of `transformers`."""
    lines = [
        "```python",
        "import vzip",
        "",
        "# reduced, with the tuned projector in its training precision",
        'model, processor = vzip.load("FOLDER")',
        "```",
        "",
    ]
    # Some families have no class in transformers. Their note takes the place of the code.
    note = families()[meta["base"]["model_type"]].export_note
    if note:
        lines.append(note)
    else:
        lines += [
            "Without `vzip` it is an ordinary model with all its visual tokens, which the projector was "
            "not tuned for:",
            "",
            "```python",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            'model = AutoModelForImageTextToText.from_pretrained("FOLDER")',
            'processor = AutoProcessor.from_pretrained("FOLDER")',
            "```",
            "",
            f"`from_pretrained` rounds the projector from float32 to the model's precision "
            f"({meta['dtype']}).",
        ]
    if meta["adapter"]:
        lines += ["", "The LoRA weights of the run are merged into the model's weights."]
    return "\n".join(lines)


def _use_llava(folder: Path) -> str:
    """Explain how to load an export for LLaVA's own code."""
    # LLaVA's loader needs a config.json in its own layout, which can't be made for every model.
    if (folder / "config.json").is_file():
        loader = (
            "`load_pretrained_model(FOLDER, model_base=BASE, model_name=...)` with a name that contains "
            "`llava`"
        )
    else:
        loader = (
            "the same, after the base model's own `config.json` in LLaVA's layout, which is not known "
            "here, has been put into FOLDER"
        )
    return (
        f"LLaVA's own code reads `mm_projector.bin` (float32): {loader}, or `--pretrain_mm_mlp_adapter "
        f"FOLDER/mm_projector.bin`. `model.projector=FOLDER/mm_projector.bin` starts another run of `vzip` "
        f"from it. LLaVA's code alone does not reduce: add VisionZip with the reducer above."
    )


def _use_peft(meta: dict[str, Any], name: str) -> str:
    """Explain how to load an adapter."""
    lora = " and LoRA of the language model" if meta["adapter"] else ""
    lines = [
        "```python",
        "import vzip",
        "from peft import PeftModel",
        "",
        f"model = ...  # the base model, {name}; peft does not check that it is",
        'PeftModel.from_pretrained(model, "FOLDER")  # changes the model in place',
        f"handle = vzip.attach(model, budget={meta.get('budget')})  # with the settings of the reducer above",
        "```",
        "",
        f"The adapter holds the whole projector{lora}.",
    ]
    # The base model's own processor may do something else with pictures that are not square.
    ratio = meta.get("image_aspect_ratio")
    if ratio is not None:
        lines.append(
            f"It was tuned with `image_aspect_ratio={ratio}`: prepare the base model's processor with "
            f'`vzip.media.set_aspect_ratio(processor, "{ratio}")`.'
        )
    return "\n".join(lines)


def _use(meta: dict[str, Any], folder: Path, *, to: str, name: str) -> str:
    if to == "hf":
        return _use_hf(meta)
    if to == "llava":
        return _use_llava(folder)
    return _use_peft(meta, name)


def _score_section(run: FinishedRun) -> str:
    if not run.scores:
        return "The run was not evaluated."
    return f"{score_table(run.scores).markdown()}\n\n{LEGEND}"


def _data(run: FinishedRun) -> str:
    """Say what the run was tuned on.

    The path of the data is not shown, because it is a path on this machine.
    """
    data = run.meta.get("data")
    if data is None:
        return "Not recorded."
    check_entries(data, _DATA, source=f"{run.path}, data in meta.json", advice="restore the file")

    # The file's name alone tells readers which data it was.
    path = run.setting("data.path")
    file = f" of `{Path(path).name}`" if isinstance(path, str) else ""
    return (
        f"{data['num_rows']:,} examples{file}: a share of {data['fraction']} of each source, drawn with "
        f"seed {data['seed']}; manifest hash `{data['hash']}`."
    )


def _settings(run: FinishedRun) -> str:
    if not run.has_settings:
        return "Not recorded."

    # Only settings that describe the training: others hold paths of this machine.
    shown = {name: run.config[name] for name in SHOWN_SETTINGS if name in run.config}
    return f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"


def _licences(base: str) -> str:
    # The weights are mostly the base model's, so its licence is theirs.
    licence = base_licence(base)
    weights = (
        "The weights are those of the base model and under its licence, which is unknown here: its files "
        "name none. Find out before you pass the weights on."
    )
    if licence:
        weights = (
            f"The weights are those of the base model and under its licence: {licence}, according to its "
            f"card."
        )
    return f"{weights} The code that made them, `vzip`, is under {CODE_LICENCE}."


def _base_name(run: FinishedRun, base: str) -> str:
    """Name the base model: by its hub id, or for a folder by the run's short name of the model."""
    name = run.setting("model.name") if Path(base).is_dir() else None
    return str(name or base_name(base))


def model_card(path: Path, folder: Path, *, to: str, base: str) -> str:
    """Write the model card of an export.

    Args:
        path: the folder of the exported run.
        folder: where it was exported.
        to: the format, "hf", "llava" or "peft".
        base: folder or hub id of the base model.
    """
    # The reducers stand near the top: without one of them, the tuned projector gives worse answers.
    run = FinishedRun(path)
    name = _base_name(run, base)
    reducers = [f"{budget} tokens: {reducer}" for budget, reducer in reducers_of(run.meta).items()]
    sections = [
        f"{_front_matter(run, base, to)}# {name}, tuned behind a token reducer",
        f"The tuned weights belong to the base model `{name}` and to the reducer {'; '.join(reducers)}.",
        f"## Use\n\n{_use(run.meta, folder, to=to, name=name)}",
        f"## Scores\n\n{_score_section(run)}",
        f"## Data\n\n{_data(run)}",
        f"## Settings\n\n{_settings(run)}",
        f"## Licences\n\n{_licences(base)}\n",
    ]
    return "\n\n".join(sections)
