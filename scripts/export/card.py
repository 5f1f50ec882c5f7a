"""The README.md of an export: what the model is, how to load it, what it was tuned on, how it scores, whose licences hold."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from omegaconf import OmegaConf
from transformers.utils import cached_file

from vzip.families import families
from vzip.runs.export import base_name
from vzip.runs.projector import read_meta, reducers_of

TAG = "vzip"
"""Of every export, in its card; what has it may be pushed, or replaced."""
SETTINGS = ("reducer", "tune", "optim", "batch", "engine", "quantize", "seed")
CODE_LICENCE = "Apache-2.0"


def _metadata(card: str | Path) -> dict[str, Any]:
    """What stands at the top of a card; nothing where it can't be understood, as anybody wrote it."""
    try:
        return metadata_load(card) or {}
    except (yaml.YAMLError, ValueError):
        return {}


def has_our_card(folder: Path) -> bool:
    """Whether a folder is what `make export` wrote."""
    card = folder / "README.md"
    return card.is_file() and TAG in (_metadata(card).get("tags") or ())


def base_licence(base: str) -> str | None:
    """The licence that the base model's own card names; None where there is no card, or none in it."""
    try:
        return _metadata(cached_file(base, "README.md")).get("license")
    except OSError:
        return None


def _front_matter(base: str, to: str) -> str:
    entries: dict[str, Any] = {
        "library_name": "peft" if to == "peft" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [TAG, "visionzip", "llava"],
    }
    if not Path(base).is_dir():
        entries["base_model"] = base
    if licence := base_licence(base):
        entries["license"] = licence
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create(entries))}---\n"


def _use_hf(meta: dict[str, Any]) -> str:
    lines = [
        "```python",
        "import vzip",
        "",
        'model, processor = vzip.load("FOLDER")  # reduced, with the tuned projector as it was trained',
        "```",
        "",
    ]
    note = families()[meta["base"]["model_type"]].export_note
    if note:
        lines += [note]
    else:
        lines += [
            "Without `vzip` it is an ordinary model with all its visual tokens, which the projector was not tuned for:",
            "",
            "```python",
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            'model = AutoModelForImageTextToText.from_pretrained("FOLDER")',
            'processor = AutoProcessor.from_pretrained("FOLDER")',
            "```",
            "",
            f"`from_pretrained` rounds the projector, which is float32 here, to the model's precision ({meta['dtype']}).",
        ]
    if meta["adapter"]:
        lines += ["", "The LoRA weights of the run are merged into the model's."]
    return "\n".join(lines)


def _use_llava(meta: dict[str, Any], folder: Path) -> str:
    if (folder / "config.json").is_file():
        loader = "`load_pretrained_model(FOLDER, model_base=BASE, model_name=...)` with a name that has `llava` in it"
    else:
        loader = (
            "with the base model's own `config.json` in LLaVA's layout, which is not known here, beside it"
        )
    return (
        f"`mm_projector.bin` (float32) is read by LLaVA's own code: {loader}, or `--pretrain_mm_mlp_adapter "
        "FOLDER/mm_projector.bin`; `model.projector=FOLDER/mm_projector.bin` starts another run of `vzip` from it. "
        "LLaVA's code alone does not reduce: add VisionZip with the reducer above."
    )


def _use_peft(meta: dict[str, Any], name: str) -> str:
    return "\n".join(
        [
            "```python",
            "import vzip",
            "from peft import PeftModel",
            "",
            f"model = ...  # the base model, {name}; peft does not check that it is",
            'PeftModel.from_pretrained(model, "FOLDER")  # changes the model in place',
            f"handle = vzip.attach(model, budget={meta.get('budget')})  # with the settings of the reducer above",
            "```",
            "",
            "The adapter is the projector, whole"
            + (", and LoRA of the language model." if meta["adapter"] else "."),
        ]
    )


def _score_lines(run: Path) -> str:
    path = run / "result.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if not rows:
        return "The run was not evaluated."
    kinds = list(rows[0]["metrics"])
    head = ["row", "visual tokens", "questions", *kinds]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for row in rows:
        scores = [f"{row['metrics'][kind]:.3f}" for kind in kinds]
        lines.append([row["name"], str(row["num_visual_tokens"]), str(row["num_questions"]), *scores])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nShare of held-out questions answered as expected; `full` has all tokens, `free` no tuning."


def _data(run: Path, meta: dict[str, Any]) -> str:
    data, config = meta.get("data"), run / "config.yaml"
    if data is None:
        return "Not recorded."
    file = f" of `{Path(OmegaConf.load(config).data.path).name}`" if config.is_file() else ""
    return (
        f"{data['num_rows']:,} rows{file}: a share of {data['fraction']} of each source, drawn with seed {data['seed']}; "
        f"manifest hash `{data['hash']}`."
    )


def _setting_lines(run: Path) -> str:
    path = run / "config.yaml"
    if not path.is_file():
        return "Not recorded."
    settings = OmegaConf.load(path)
    chosen = OmegaConf.create({key: settings[key] for key in SETTINGS if key in settings})
    return f"```yaml\n{OmegaConf.to_yaml(chosen)}```"


def _name(run: Path, base: str) -> str:
    """The base model's: its hub id; of a folder the run's word for it, or the folder's own name."""
    config = run / "config.yaml"
    if Path(base).is_dir() and config.is_file():
        return str(OmegaConf.load(config).model.name)
    return base_name(base)


def model_card(run: Path, folder: Path, *, to: str, base: str) -> str:
    """The card of `run` as it was exported to `folder`; `base` is the folder or hub id of its base model."""
    meta, name = read_meta(run), _name(run, base)
    use = {
        "hf": lambda: _use_hf(meta),
        "llava": lambda: _use_llava(meta, folder),
        "peft": lambda: _use_peft(meta, name),
    }
    reducers = "; ".join(f"{budget} tokens: {reducer}" for budget, reducer in reducers_of(meta).items())
    licence = base_licence(base)
    licences = (
        f"The weights are those of the base model and under its licence: {licence}, as its card says."
        if licence
        else "The weights are those of the base model and under its licence, which is unknown here: its files name none. "
        "Find out before you pass the weights on."
    )
    return "\n\n".join(
        [
            _front_matter(base, to) + f"# {name}, tuned behind a token reducer",
            f"What was tuned belongs to the base model `{name}` and to the reducer {reducers}.",
            f"## Use\n\n{use[to]()}",
            f"## Scores\n\n{_score_lines(run)}",
            f"## Data\n\n{_data(run, meta)}",
            f"## Settings\n\n{_setting_lines(run)}",
            f"## Licences\n\n{licences} The code that made it, `vzip`, is under {CODE_LICENCE}.\n",
        ]
    )
