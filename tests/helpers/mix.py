"""A small copy of LLaVA's mix-665k: its sources in their shares, its paths and kinds of examples, and
its pictures.
"""

import io
import json
import random
import zipfile
from pathlib import Path

from PIL import Image

from tests.helpers.broken import messages

COUNTS = {"coco": 364_100, "vg": 86_417, "ocr_vqa": 80_000, "gqa": 72_140, "textvqa": 21_953, "text": 40_688}
"""Examples of the real mix by source; "text" are those without a picture."""
ZIP_FILES = {"gqa": "gqa/images.zip", "textvqa": "textvqa/train_val_images.zip", "ocr_vqa": "ocr_vqa.zip"}
WORDS = (
    "the a red car left right two people street sign says small dog near tree what where which is on of in"
)
SHORT = "\nAnswer the question using a single word or phrase."
PATHS = {
    "coco": "coco/train2017/{0:012}.jpg",
    "vg": "vg/VG_100K{1}/{0}.jpg",
    "ocr_vqa": "ocr_vqa/images/{0:010}.jpg",
    "gqa": "gqa/images/{0}.jpg",
    "textvqa": "textvqa/train_images/{0:016x}.jpg",
}


def _text(draw, low, high):
    return " ".join(draw.choices(WORDS.split(), k=draw.randint(low, high)))


def _messages(turns):
    return messages(*(text for turn in turns for text in turn))


def _text_example(draw, number):
    """A talk of ShareGPT, some of which start with an answer."""
    turns = [(_text(draw, 5, 40), _text(draw, 20, 120)) for _ in range(draw.randint(1, 5))]
    talk = _messages(turns)
    if number % 7 == 0:
        talk.insert(0, {"from": "gpt", "value": "the end of an answer"})
    return {"id": f"{draw.getrandbits(40):x}_{number % 3}", "model": "", "conversations": talk}


def _picture_example(draw, source, number):
    """Short questions about a picture, or a long talk, with the picture before or behind the first
    question.
    """
    path = PATHS[source].format(number, draw.choice(["", "_2"]))
    is_long = source == "coco" and number % 2
    turns = []
    for _ in range(draw.randint(1, 4)):
        question = _text(draw, 4, 12)
        if is_long:
            turns.append((question, _text(draw, 20, 60)))
        else:
            turns.append((question + SHORT, _text(draw, 1, 2)))

    question, answer = turns[0]
    question = f"{question}\n<image>" if number % 5 == 0 else f"<image>\n{question}"
    talk = _messages([(question, answer), *turns[1:]])
    return {"id": Path(path).stem, "image": path, "conversations": talk}


def _jpeg(draw):
    """A picture of a few colours, 40 to 120 pixels a side."""
    size = (draw.randint(40, 120), draw.randint(40, 120))
    file = io.BytesIO()
    Image.frombytes("RGB", (4, 3), draw.randbytes(36)).resize(size).save(file, "JPEG")
    return file.getvalue()


def save_mix(folder: Path, num_examples: int, *, seed: int = 0) -> None:
    """Write `folder`/published/ with mix.json and all pictures, as they are published."""
    draw = random.Random(seed)
    examples = []
    for source, count in COUNTS.items():
        share = count / sum(COUNTS.values())
        for number in range(max(1, round(num_examples * share))):
            if source == "text":
                examples.append(_text_example(draw, number))
            else:
                examples.append(_picture_example(draw, source, number))

    published = folder / "published"
    archives = {}
    for source, name in ZIP_FILES.items():
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        method = zipfile.ZIP_DEFLATED if source == "gqa" else zipfile.ZIP_STORED
        archives[source] = zipfile.ZipFile(published / name, "w", method)

    for example in examples:
        if "image" not in example:
            continue
        source, below = example["image"].split("/", 1)
        if source in archives:
            archives[source].writestr(below, _jpeg(draw))
        else:
            path = published / source / below
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_jpeg(draw))

    for archive in archives.values():
        archive.close()
    draw.shuffle(examples)
    (published / "mix.json").write_text(json.dumps(examples))


def settings(url: str, folder: Path) -> list[str]:
    """Overrides of `data=mix665k` that take everything from a server of `published`."""
    overrides = [
        f"data.path={folder}/mine/mix.json",
        f"data.address={url}/mix.json",
        f"data.image_folder={folder}/mine/images",
        f"data.pictures.coco=[{url}/coco/]",
        f"data.pictures.vg=[{url}/vg/]",
    ]
    overrides += [f"data.pictures.{source}=[{url}/{name}]" for source, name in ZIP_FILES.items()]
    return overrides
