"""A small copy of LLaVA's mix-665k: its sources in their shares, its paths and kinds of rows, and its pictures as published."""

import io
import json
import random
import zipfile
from pathlib import Path

from PIL import Image

COUNTS = {"coco": 364_100, "vg": 86_417, "ocr_vqa": 80_000, "gqa": 72_140, "textvqa": 21_953, "text": 40_688}
"""Rows of the real mix by source; "text" are those without a picture."""
WORDS = tuple(
    [
        "the",
        "a",
        "red",
        "car",
        "left",
        "right",
        "two",
        "people",
        "street",
        "sign",
        "says",
        "small",
        "dog",
        "near",
        "tree",
        "what",
        "where",
        "which",
        "is",
        "on",
        "of",
        "in",
    ]
)
SHORT = "\nAnswer the question using a single word or phrase."


def _text(draw, low, high):
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def _path(draw, source, number):
    return {
        "coco": f"coco/train2017/{number:012}.jpg",
        "vg": f"vg/VG_100K{draw.choice(['', '_2'])}/{2_300_000 + number}.jpg",
        "ocr_vqa": f"ocr_vqa/images/{number:010}.jpg",
        "gqa": f"gqa/images/{2_400_000 + number}.jpg",
        "textvqa": f"textvqa/train_images/{draw.getrandbits(64):016x}.jpg",
    }[source]


def _row(draw, source, number):
    """A row as the mix has it: many short questions, one long talk, boxes, or ShareGPT's text."""
    if source == "text":
        turns = [(_text(draw, 5, 40), _text(draw, 20, 120)) for _ in range(draw.randint(1, 5))]
        row = {"id": f"{draw.getrandbits(40):x}_{number % 3}", "model": ""}
    else:
        path = _path(draw, source, number)
        long = source == "coco" and number % 2
        turns = [
            (_text(draw, 4, 12) + ("" if long else SHORT), _text(draw, *((20, 60) if long else (1, 2))))
            for _ in range(draw.randint(1, 4))
        ]
        question = turns[0][0]
        turns[0] = (f"{question}\n<image>" if number % 5 == 0 else f"<image>\n{question}", turns[0][1])
        row = {"id": Path(path).stem, "image": path}
    messages = [
        {"from": who, "value": text}
        for turn in turns
        for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    if source == "text" and number % 7 == 0:
        messages.insert(0, {"from": "gpt", "value": "the end of an answer"})
    return {**row, "conversations": messages}


def _picture(draw):
    """JPEG bytes of a few colours, 40 to 120 pixels a side."""
    size = draw.randint(40, 120), draw.randint(40, 120)
    image = Image.frombytes("RGB", (4, 3), draw.randbytes(36)).resize(size)
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def save_mix(folder: Path, num_examples: int, *, seed: int = 0) -> Path:
    """Write `folder`/published/ with mix.json and all pictures as they are published: the path of mix.json."""
    draw, total = random.Random(seed), sum(COUNTS.values())
    published = folder / "published"
    rows = []
    zips = {"gqa": "gqa/images.zip", "textvqa": "textvqa/train_val_images.zip", "ocr_vqa": "ocr_vqa.zip"}
    for source, count in COUNTS.items():
        rows += [_row(draw, source, number) for number in range(max(1, round(num_examples * count / total)))]
    archives = {}
    for source, name in zips.items():
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        archives[source] = zipfile.ZipFile(published / name, "w")
    for row in rows:
        if "image" in row:
            source, rest = row["image"].split("/", 1)
            if source in archives:
                archives[source].writestr(
                    rest, _picture(draw), zipfile.ZIP_DEFLATED if source == "gqa" else zipfile.ZIP_STORED
                )
            else:
                (published / source / rest).parent.mkdir(parents=True, exist_ok=True)
                (published / source / rest).write_bytes(_picture(draw))
    for archive in archives.values():
        archive.close()
    draw.shuffle(rows)
    (published / "mix.json").write_text(json.dumps(rows))
    return published / "mix.json"


def settings(url: str, folder: Path) -> list[str]:
    """Overrides of `data=mix665k` that take everything from a server of `published`."""
    return [
        f"data.path={folder}/mine/mix.json",
        f"data.address={url}/mix.json",
        f"data.image_folder={folder}/mine/images",
        f"data.pictures.coco=[{url}/coco/]",
        f"data.pictures.vg=[{url}/vg/]",
        f"data.pictures.gqa=[{url}/gqa/images.zip]",
        f"data.pictures.textvqa=[{url}/textvqa/train_val_images.zip]",
        f"data.pictures.ocr_vqa=[{url}/ocr_vqa.zip]",
    ]
