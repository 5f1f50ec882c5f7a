"""Measure the data loader on this machine's CPU: pictures per second, time to the first batch.

Examples and pictures are made up, in the shapes of LLaVA's instruction data. The JPEGs have its
usual sizes. They are noise with the spectrum of photographs (power falls with the square of the
frequency) and some grain. A picture of 640 x 480 pixels takes 160 KB, like COCO's, so that decoding
costs the same. Texts have the recorded lengths of LLaVA's mix. Pictures and texts become packed
micro batches on the same path as in training. The command also counts the padding of
engine=reference.

python -m scripts.bench.loader --model next --seconds 10 --workers 1 2 --json loader.json
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from rich.table import Table
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaNextConfig, LlavaNextImageProcessorPil

from data.batches.collate import Collator, MicroBatch
from data.batches.dataset import BatchPlan, MicroBatches, PaddedBatcher, loader
from data.examples.arrow import write_arrow
from data.examples.tokens import SCHEMA, Example, Examples, record_of
from scripts.bench.command import bench_parser, print_environment, print_table
from scripts.bench.examples import LENGTHS
from scripts.bench.paths import pack_batches
from train.hardware import current_environment
from vzip.families import families
from vzip.files import write_json
from vzip.media import MediaInputs
from vzip.pictures import open_picture
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED

# (height, width) of the pictures, and how many have that size. They are typical of COCO, of Visual
# Genome and GQA, of book covers, and of TextVQA.
SIZES = {
    (480, 640): 9,
    (640, 480): 4,
    (427, 640): 4,
    (375, 500): 4,
    (500, 330): 3,
    (768, 1024): 1,
}

# At this quality a picture of 640 x 480 pixels takes 160 KB, like COCO's.
JPEG_QUALITY = 88

# Standard deviation of the grain, in levels of 0 to 255.
GRAIN = 7.0

# Settings of a processor that makes squares of 336 pixels.
SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}

# Config, processor and reducer of each model. The config's defaults describe the published model of
# 336 pixels, and the reducer has a middle budget.
MODELS: dict[str, tuple[Any, Any, VisionZip]] = {
    "llava": (LlavaConfig, CLIPImageProcessorPil, VisionZip(dominant=54, contextual=10)),
    "next": (LlavaNextConfig, LlavaNextImageProcessorPil, VisionZip(dominant=27, contextual=5)),
}

# Examples of a step, packed tokens of a micro batch, and examples of a padded one.
BATCH_SIZE = 128
TOKENS = 16_384
MICRO = 16


def photograph(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Make a picture of noise with the spectrum and the correlated channels of a photograph."""
    # Dividing by infinity removes the mean (frequency 0), whose level is added below.
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def noise() -> np.ndarray:
        spectrum = np.fft.rfft2(generator.normal(size=(height, width))) / frequency
        field = np.fft.irfft2(spectrum, s=(height, width))
        normalized: np.ndarray = field / field.std()
        return normalized

    # The channels of a photograph are alike, so they share most of their noise: the light.
    light = noise()
    channels = []
    for _ in range(3):
        grain = GRAIN * generator.normal(size=(height, width))
        channels.append(128 + 50 * light + 15 * noise() + grain)

    levels = np.stack(channels, axis=-1).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8))


def write_pictures(folder: Path, *, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Write JPEGs to a folder. Return the (height, width) of each, by its name."""
    generator = np.random.default_rng(seed)
    sizes = {}
    for (height, width), count in SIZES.items():
        for number in range(count):
            name = f"{height}x{width}-{number}.jpg"
            photograph(generator, height, width).save(folder / name, quality=JPEG_QUALITY)
            sizes[name] = (height, width)
    return sizes


def recorded_lengths() -> tuple[np.ndarray, np.ndarray]:
    """Read the text tokens of the mix's examples, with and without a picture, in random order."""
    generator = np.random.default_rng(0)
    with np.load(LENGTHS) as recorded:
        with_picture = generator.permutation(recorded["text_tokens"])
        without = generator.permutation(recorded["text_only_tokens"])
    return with_picture, without


def loader_examples(
    lengths: tuple[np.ndarray, np.ndarray], sizes: Mapping[str, tuple[int, int]], image_id: int
) -> Iterator[Example]:
    """Make up examples of some lengths. A third of the tokens of each are labels.

    Args:
        lengths: text tokens of examples with a picture, and of those without.
        sizes: (height, width) of the pictures, by name.
        image_id: id of the placeholder.
    """
    names = list(sizes)
    with_picture, without = lengths
    for number, length in enumerate(np.concatenate([with_picture, without]).tolist()):
        # The placeholder is the second token, behind BOS.
        ids = [1, *range(100, 99 + length)]
        media = {}
        if number < len(with_picture):
            name = names[number % len(names)]
            ids[1] = image_id
            media["image"] = (Path(name),)

        # The answer comes last.
        num_labels = length // 3
        labels = [IGNORED] * (length - num_labels) + ids[length - num_labels :]
        yield Example(ids, labels, media, sizes=(sizes[name],) if media else ())


def write_examples(examples: Iterator[Example], target: Path) -> None:
    """Write examples to a file, as tokenized conversations are written."""
    records = (record_of(example, whole_labels=example.labels) for example in examples)
    write_arrow(records, SCHEMA, target)


def make_loader_collator(model: str) -> Collator:
    """Make the collator of a model of 336 pixels, without its weights."""
    # The config is enough for the family, because the tower does not run here.
    config_class, processor_class, reducer = MODELS[model]
    config = config_class()
    family = families()[config.model_type](SimpleNamespace(config=config))
    processor = SimpleNamespace(
        image_processor=processor_class(**SQUARE),
        tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=2),
    )
    return Collator(processor, family, reducer)


def milliseconds(work: Callable[[Path], Any], paths: list[Path], *, rounds: int) -> float:
    """Measure the CPU time per picture: the median over rounds. Other programs don't add to it."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        for path in paths:
            work(path)
        seconds.append((time.process_time() - start) / len(paths))
    return 1000 * statistics.median(seconds)


def stage_times(model: str, paths: list[Path], *, rounds: int) -> dict[str, float]:
    """Measure the CPU milliseconds to open a picture, and to process it to uint8 and to float32.

    The times to process a picture include opening it.
    """
    # Training sends uint8 and normalizes on the device. Stock trainers normalize on the CPU.
    process = MODELS[model][1](**SQUARE)

    def to_uint8(path: Path) -> Any:
        return process([open_picture(path)], do_rescale=False, do_normalize=False, return_tensors="pt")

    def to_float32(path: Path) -> Any:
        return process([open_picture(path)], return_tensors="pt")

    return {
        "open_ms": milliseconds(open_picture, paths, rounds=rounds),
        "open_and_process_uint8_ms": milliseconds(to_uint8, paths, rounds=rounds),
        "open_and_process_float32_ms": milliseconds(to_float32, paths, rounds=rounds),
    }


def _pixels(batch: MicroBatch) -> Tensor:
    """Return the pixels of a micro batch: uint8[images, ...]."""
    images = batch.media["image"]
    assert isinstance(images, MediaInputs)
    return images.pixels


def num_images(batch: MicroBatch) -> int:
    """Count the images of a micro batch. The blank one of a batch without images does not count."""
    return len(_pixels(batch)) if batch.num_placeholders["image"] else 0


def pictures_per_s(batches: MicroBatches, *, num_workers: int, seconds: float, rounds: int) -> list[float]:
    """Measure the pictures per second of all workers together, in each round."""
    stream = loader(batches, first=0, num_workers=num_workers)

    # Wait until all workers have started, which takes seconds and happens once in a run.
    for _ in range(2 * num_workers):
        next(stream)

    # Each round counts what arrives within the seconds, and divides by the time it really took.
    rates = []
    for _ in range(rounds):
        count = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            count += num_images(next(stream))
        rates.append(count / (time.perf_counter() - start))
    return rates


def first_batch(tokens: Path, pictures: Path, collator: Collator) -> tuple[MicroBatches, dict[str, float]]:
    """Open the examples and build the first micro batch.

    Args:
        tokens: file of the examples.
        pictures: folder of the pictures.
        collator: of the model.

    Returns:
        (the micro batches of an epoch, seconds until their order is known and until the first one is built)
    """
    # First the order of an epoch, which needs the lengths of all examples.
    start = time.perf_counter()
    examples = Examples.open(tokens, pictures)
    plan = BatchPlan(size=BATCH_SIZE, world_size=1, num_steps=len(examples) // BATCH_SIZE, seed=0)
    batches, _ = pack_batches(collator, examples, plan, tokens=TOKENS)
    order_s = time.perf_counter() - start

    # Then the first micro batch, with the start of a worker.
    next(loader(batches, first=0, num_workers=1))
    return batches, {"order_s": order_s, "first_batch_s": time.perf_counter() - start}


def _share_of_padding(lengths: Tensor) -> float:
    """Compute the share of token slots that are padding.

    Args:
        lengths: int64[micro batches, examples], tokens of each example.
    """
    # Each example of a micro batch is padded to the longest one.
    num_slots = lengths.amax(dim=1).sum().item() * lengths.shape[1]
    return 1 - lengths.sum().item() / num_slots


def padding(batches: MicroBatches, collator: Collator) -> dict[str, float]:
    """Compute the share of padding in an epoch of the reference path.

    Once for the order in which examples are drawn, and once for the order that the path makes of it.
    """
    batcher = PaddedBatcher(collator, batches.batcher.examples, batches.plan, micro=MICRO)
    lengths = batcher.lengths[0]

    # The path sorts the examples of a step by length before it cuts them.
    ordered = []
    for step, examples in enumerate(batches.examples_by_step.tolist()):
        ordered += [spec.examples for spec in batcher.cut(step, examples)]

    return {
        "padding_drawn": _share_of_padding(lengths[batches.examples_by_step.view(-1, MICRO)]),
        "padding_ordered": _share_of_padding(lengths[torch.tensor(ordered)]),
    }


def measure_loader(model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything for a model. `folder` is a scratch folder."""
    # Write what a run would find: pictures, and token ids in a file.
    collator = make_loader_collator(model)
    sizes = write_pictures(folder)
    tokens = folder / "tokens.arrow"
    image_id = collator.family.placeholder_id("image")
    write_examples(loader_examples(recorded_lengths(), sizes, image_id), tokens)
    batches, seconds = first_batch(tokens, folder, collator)

    # Measure the whole path, then its parts in this process.
    rates = {}
    for num_workers in arguments.workers:
        rates[num_workers] = pictures_per_s(
            batches,
            num_workers=num_workers,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
        )

    paths = [folder / name for name in sizes]
    stages = stage_times(model, paths, rounds=arguments.rounds)

    # Any micro batch that has pictures shows how many bytes one takes.
    with_images = next(batch for batch in loader(batches, first=1, num_workers=0) if num_images(batch))
    num_bytes = _pixels(with_images).numel() / num_images(with_images)
    return {
        "rates": rates,
        **stages,
        "file_kb": statistics.mean(path.stat().st_size for path in paths) / 1000,
        "rows": len(batches.batcher.examples),
        "bytes_uint8": num_bytes,
        "bytes_float32": 4 * num_bytes,
        **seconds,
        **padding(batches, collator),
    }


def _rate_cell(rates: Sequence[float], num_workers: int) -> str:
    """Write the median, least and most pictures per second, and the median of one worker."""
    median = statistics.median(rates)
    return f"{median:.0f} ({min(rates):.0f} to {max(rates):.0f}); {median / num_workers:.0f} a worker"


def print_loader(model: str, figures: Mapping[str, Any]) -> None:
    """Print the table of a model."""
    table = Table(title=f"loader, {model}, 336 px", title_justify="left", show_header=False)
    for num_workers, rates in figures["rates"].items():
        workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
        table.add_row(f"pictures/s, {workers}", _rate_cell(rates, num_workers))

    table.add_row("a picture's file", f"{figures['file_kb']:.0f} KB in the mean")
    for label, name in (
        ("opened", "open_ms"),
        ("opened and processed to uint8", "open_and_process_uint8_ms"),
        ("opened and processed to float32", "open_and_process_float32_ms"),
    ):
        table.add_row(label, f"{figures[name]:.1f} CPU ms a picture")

    num_bytes = f"{figures['bytes_uint8']:,.0f} (as float32 {figures['bytes_float32']:,.0f})"
    table.add_row("bytes a picture to the device", num_bytes)

    first = f"{figures['first_batch_s']:.2f} s, of which the order {figures['order_s']:.2f} s"
    table.add_row(f"first micro batch of {figures['rows']:,} examples", first)

    ordered, drawn = figures["padding_ordered"], figures["padding_drawn"]
    table.add_row(
        "padding, engine=reference",
        f"{ordered:.1%} of the token slots ({drawn:.1%} in the drawn order)",
    )
    print_table(table)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = bench_parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of workers to try")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of a round")
    arguments = parser.parse_args()

    # Workers have one thread each, so this process has one, too.
    torch.set_num_threads(1)

    environment = current_environment(torch.device("cpu"))
    hardware = {
        "cpu": environment.device,
        "cores": environment.num_cpus,
        "python": environment.python,
        "pillow": pillow_version,
        "torch": environment.torch,
    }
    print_environment(hardware)

    figures = {}
    for model in arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            figures[model] = measure_loader(model, arguments, Path(folder))
        print_loader(model, figures[model])

    if arguments.json is not None:
        write_json(arguments.json, {"hardware": hardware, **figures})


if __name__ == "__main__":
    main()
