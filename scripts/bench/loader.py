"""Measure the data loader on this machine's CPU: pictures a second, bytes to the device, seconds to the first batch.

The rows and pictures are made up, with the shapes of LLaVA's instruction data: JPEGs of its usual sizes, of noise with the
spectrum of photographs (power falls with the square of the frequency) and some grain, in the quality at which a picture of
640 x 480 pixels takes about the 160 KB that COCO's take, so that decoding costs what it does there; text lengths as
`scripts/bench/mix665k_tenth_lengths.npz` has them. The way from file to packed micro batch is the one that training takes; what padding
engine=reference has is told too.

python -m scripts.bench.loader --model next --seconds 10 --workers 1 2 --json loader.json
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from rich.console import Console
from rich.table import Table
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaNextConfig, LlavaNextImageProcessorPil

from data.batches.collate import Collator, MicroBatch, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PackedBatcher, PaddedBatcher, has_media, loader
from data.batches.packing import shared_prefix
from data.examples.arrow import write_arrow
from data.examples.tokens import SCHEMA, Examples
from train.hardware import device_name
from vzip.families import families
from vzip.media import pixels_of
from vzip.pictures import open_picture
from vzip.reducers.visionzip import VisionZip

LENGTHS = Path(__file__).with_name("mix665k_tenth_lengths.npz")
"""Text tokens of a tenth of LLaVA's mix, 66,529 rows, by row; estimated from published counts, not read from the mix."""
SIZES = {(480, 640): 9, (640, 480): 4, (427, 640): 4, (375, 500): 4, (500, 330): 3, (768, 1024): 1}
"""(height, width) of pictures and their weights: COCO; COCO, VG and GQA; book covers; TextVQA."""
QUALITY, GRAIN = 88, 7.0
"""JPEG quality, and standard deviation of the grain in levels."""
SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
MODELS: dict[str, tuple[Any, Any, VisionZip]] = {
    "llava": (LlavaConfig, CLIPImageProcessorPil, VisionZip(dominant=54, contextual=10)),
    "next": (LlavaNextConfig, LlavaNextImageProcessorPil, VisionZip(dominant=27, contextual=5)),
}
"""Config and processor, both by default those of the published 336-pixel models, and the reducer of the middle budget."""
GLOBAL, TOKENS, MICRO = 128, 16_384, 16
"""Rows of a step; packed tokens of a micro batch; rows of a padded one."""


def photograph(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise with a photograph's spectrum, its channels alike as they are in one."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def noise() -> np.ndarray:
        field = np.fft.irfft2(
            np.fft.rfft2(generator.normal(size=(height, width))) / frequency, s=(height, width)
        )
        scaled: np.ndarray = field / field.std()
        return scaled

    light = noise()
    channels = [
        128 + 50 * light + 15 * noise() + GRAIN * generator.normal(size=(height, width)) for _ in range(3)
    ]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, *, seed: int = 0) -> dict[str, tuple[int, int]]:
    """(height, width) by name of the JPEGs written to `folder`."""
    generator, found = np.random.default_rng(seed), {}
    for (height, width), count in SIZES.items():
        for number in range(count):
            name = f"{height}x{width}-{number}.jpg"
            photograph(generator, height, width).save(folder / name, quality=QUALITY)
            found[name] = (height, width)
    return found


def recorded_lengths() -> tuple[np.ndarray, np.ndarray]:
    """Text tokens of rows with and without a picture, one after the other as drawn at random."""
    generator = np.random.default_rng(0)
    with np.load(LENGTHS) as recorded:
        return generator.permutation(recorded["text_tokens"]), generator.permutation(
            recorded["text_only_tokens"]
        )


def records(
    lengths: tuple[np.ndarray, np.ndarray], sizes: dict[str, tuple[int, int]], image_id: int
) -> Iterator[dict[str, Any]]:
    """Rows of token arrays: a third of each row's tokens are labels."""
    names, (with_picture, without) = list(sizes), lengths
    for number, length in enumerate(np.concatenate([with_picture, without]).tolist()):
        images = [names[number % len(names)]] if number < len(with_picture) else []
        ids = [1, *[image_id] * len(images), *range(100, 99 + length - len(images))]
        yield {
            "id": str(number),
            "source": "noise",
            "ids": ids,
            "labels": [-100] * (length - length // 3) + ids[length - length // 3 :],
            "images": images,
            "videos": [],
            "sizes": [side for name in images for side in sizes[name]],
            "num_images": len(images),
            "num_videos": 0,
            "num_tokens": length,
            "num_labels": length // 3,
            "num_whole_tokens": length,
            "num_whole_labels": length // 3,
        }


def make_loader_collator(model: str) -> Collator:
    """The loader's collator for a model of 336 pixels, without weights."""
    config_class, processor_class, reducer = MODELS[model]
    config = config_class()
    family = families()[config.model_type](SimpleNamespace(config=config))
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    return Collator(
        SimpleNamespace(image_processor=processor_class(**SQUARE), tokenizer=tokenizer), family, reducer
    )


def milliseconds(work: Callable[[Path], Any], paths: list[Path], *, rounds: int) -> float:
    """CPU time of one picture, which other programs don't take from: the median of rounds over all, in this process."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        for path in paths:
            work(path)
        seconds.append((time.process_time() - start) / len(paths))
    return 1000 * statistics.median(seconds)


def stage_times(model: str, paths: list[Path], *, rounds: int) -> dict[str, float]:
    """CPU milliseconds a picture: opened, and opened and processed to uint8 and to float32."""
    process = MODELS[model][1](**SQUARE)
    return {
        "open_ms": milliseconds(open_picture, paths, rounds=rounds),
        "open_and_process_uint8_ms": milliseconds(
            lambda path: process(
                [open_picture(path)], do_rescale=False, do_normalize=False, return_tensors="pt"
            ),
            paths,
            rounds=rounds,
        ),
        "open_and_process_float32_ms": milliseconds(
            lambda path: process([open_picture(path)], return_tensors="pt"), paths, rounds=rounds
        ),
    }


def num_images(batch: MicroBatch) -> int:
    """Images of a micro batch, without a blank one."""
    return len(pixels_of(batch.media["image"])) if batch.num_placeholders["image"] else 0


def pictures_per_s(batches: MicroBatches, *, num_workers: int, seconds: float, rounds: int) -> list[float]:
    """Of all workers together, in each round, once all of them are at work."""
    stream = loader(batches, first=0, num_workers=num_workers)
    for _ in range(2 * num_workers):
        next(stream)
    found = []
    for _ in range(rounds):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            count += num_images(next(stream))
        found.append(count / (time.perf_counter() - start))
    return found


def first_batch(tokens: Path, pictures: Path, collate: Collator) -> tuple[MicroBatches, dict[str, float]]:
    """(micro batches, seconds) from opening the token arrays to the order of an epoch, and to the first micro batch."""
    start = time.perf_counter()
    examples = Examples.open(tokens, pictures)
    plan = BatchPlan(size=GLOBAL, world_size=1, num_steps=len(examples) // GLOBAL, seed=0)
    prefix = shared_prefix(examples, [collate.family.placeholder_id(kind) for kind in collate.kinds])
    packer, has_gradient = Packer(collate, num_prefix=len(prefix)), has_media(examples)
    batcher = PackedBatcher(
        [packer],
        examples,
        plan,
        tokens=TOKENS,
        num_run=packer.lengths(examples)[None],
        has_gradient=has_gradient,
    )
    batches = MicroBatches(batcher, plan, rank=0, has_gradient=has_gradient)
    ordered = time.perf_counter() - start
    next(loader(batches, first=0, num_workers=1))
    return batches, {"order_s": ordered, "first_batch_s": time.perf_counter() - start}


def padding(batches: MicroBatches, collate: Collator) -> dict[str, float]:
    """Share of the token slots of an epoch that are padding where rows are padded: in the drawn order, and as it is done."""
    batcher = PaddedBatcher(collate, batches.batcher.examples, batches.plan, micro=MICRO)

    def share(rows: torch.Tensor) -> float:
        lengths = batcher.lengths[0, rows]
        return 1 - lengths.sum().item() / (lengths.amax(dim=1).sum().item() * MICRO)

    micro_batches = []
    for step, examples in enumerate(batches.examples_by_step.tolist()):
        micro_batches += [spec.examples for spec in batcher.cut(step, examples)]

    return {
        "padding_drawn": share(batches.examples_by_step.view(-1, MICRO)),
        "padding_ordered": share(torch.tensor(micro_batches)),
    }


def hardware() -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pillow": pillow_version,
        "torch": torch.__version__,
    }


def measure_loader(model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of a model."""
    sizes, collate, tokens = write_pictures(folder), make_loader_collator(model), folder / "tokens.arrow"
    image_id = collate.family.placeholder_id("image")
    write_arrow(records(recorded_lengths(), sizes, image_id), SCHEMA, tokens)
    batches, seconds = first_batch(tokens, folder, collate)
    some = next(batch for batch in loader(batches, first=1, num_workers=0) if num_images(batch))
    num_bytes = pixels_of(some.media["image"]).numel() / num_images(some)
    return {
        "rates": {
            num_workers: pictures_per_s(
                batches, num_workers=num_workers, seconds=arguments.seconds, rounds=arguments.rounds
            )
            for num_workers in arguments.workers
        },
        **stage_times(model, [folder / name for name in sizes], rounds=arguments.rounds),
        "file_kb": statistics.mean((folder / name).stat().st_size for name in sizes) / 1000,
        "rows": len(batches.batcher.examples),
        "bytes_uint8": num_bytes,
        "bytes_float32": 4 * num_bytes,
        **seconds,
        **padding(batches, collate),
    }


def print_loader(model: str, found: dict[str, Any]) -> None:
    """Print the table of a model."""
    table = Table(title=f"loader, {model}, 336 px", title_justify="left", show_header=False)
    for num_workers, rates in found["rates"].items():
        middle, spread = statistics.median(rates), f"{min(rates):.0f} to {max(rates):.0f}"
        workers = f"{num_workers} worker{'s' * (num_workers > 1)}"
        table.add_row(
            f"pictures/s, {workers}", f"{middle:.0f} ({spread}); {middle / num_workers:.0f} a worker"
        )
    table.add_row("a picture's file", f"{found['file_kb']:.0f} KB in the mean")
    table.add_row("opened", f"{found['open_ms']:.1f} CPU ms a picture")
    table.add_row(
        "opened and processed to uint8", f"{found['open_and_process_uint8_ms']:.1f} CPU ms a picture"
    )
    table.add_row(
        "opened and processed to float32", f"{found['open_and_process_float32_ms']:.1f} CPU ms a picture"
    )
    table.add_row(
        "bytes a picture to the device",
        f"{found['bytes_uint8']:,.0f} (as float32 {found['bytes_float32']:,.0f})",
    )
    first = f"{found['first_batch_s']:.2f} s, of which the order {found['order_s']:.2f} s"
    table.add_row(f"first micro batch of {found['rows']:,} rows", first)
    table.add_row(
        "padding, engine=reference",
        f"{found['padding_ordered']:.1%} of the token slots ({found['padding_drawn']:.1%} in the drawn order)",
    )
    Console().print(table)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of workers to try")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is shown")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    machine, figures = hardware(), {}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for model in arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            figures[model] = measure_loader(model, arguments, Path(folder))
        print_loader(model, figures[model])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"hardware": machine, **figures}, indent=2))


if __name__ == "__main__":
    main()
