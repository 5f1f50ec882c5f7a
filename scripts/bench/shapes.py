"""What the benchmark of tuning runs on: models with random weights, rows of the recorded lengths, pictures of noise; and how
much of it is necessary. Neither Hydra nor DeepSpeed is needed.
"""

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import CLIPImageProcessorPil

from data.batches.collate import Collator
from data.examples.tokens import Example
from data.paths import ROOT
from vzip.cost import attention_flops, example_cost, linear_flops
from vzip.families import Family
from vzip.families.llava import Llava
from vzip.media import LOOKUP, lookup_table
from vzip.reducers import Reducer
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED

LENGTHS = ROOT / "data" / "mix665k_tenth_lengths.npz"
"""Text and label tokens of a tenth of LLaVA's mix by row; estimated from published counts, not read from the mix."""
NUM_PREFIX = 35
"""Tokens that each of these rows begins with: BOS, the system prompt, and "USER: "."""
MAX_TURNS, NUM_PICTURES = 3, 16
FIRST_ID = 3
"""The ids before it are Llama's special ones."""
TILES = 2
"""Tiles a side of the pictures, where a model cuts them: 5 tiles with the base tile, as most pictures of the mix give."""

# Vicuna's and CLIP-L's proportions: MLPs of 2.69 and 4 widths, heads of 128 and 64, a tower a quarter as wide as the language
# model and three quarters as deep, with as many patches. The vocabulary is small in proportion: a head of 32,000 tokens is 1/50
# of a 7B model's work for a token, and would be more than half of this one's. Steps have half of the rows, and the reference's
# micro batches too, which leaves the share of padding.
TINY_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 1,
    "projection_dim": 64,
}
TINY_LANGUAGE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "vocab_size": 512,
}
TINY = {
    "image_token_index": 511,
    "image_seq_length": 576,
    "vision_feature_layer": -2,
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **TINY_TOWER},
    "text_config": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.08,  # at this width, outputs as large as 0.02 gives at 4,096
        **TINY_LANGUAGE,
    },
}


@dataclass(frozen=True)
class Shape:
    """A model to measure, to how many tokens it reduces its pictures, and its steps."""

    name: str
    family: type[Family]
    architecture: dict[str, Any]
    budget: int
    rows: int = 128
    """Of a step."""
    micro: int = 16
    """Rows of a micro batch of the reference."""

    @property
    def reducer(self) -> VisionZip:
        return VisionZip(budget=self.budget, tiles=self.family.budget_tiles)

    def shallow(self, num_layers: int) -> Self:
        """The same with a language model of so many layers."""
        text = self.architecture["text_config"] | {"num_hidden_layers": num_layers}
        return replace(self, architecture=self.architecture | {"text_config": text})


def shape_of(name: str) -> Shape:
    """ "tiny", or a model of `configs/model` by its name."""
    if name == "tiny":
        return Shape(name, Llava, TINY, budget=64, rows=64, micro=8)
    model = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())["model"]
    return Shape(name, pkgutil.resolve_name(model["_target_"]), model["architecture"], budget=model["budget"])


def make_family(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> Family:
    """The model with random weights on the device, frozen but for a projector in float32, as it is tuned.

    Its tower's queries and keys are scaled, so that attention is as far from uniform as a trained tower's: else rounding would
    draw the most salient patches.
    """
    torch.manual_seed(0)
    with torch.device(device):
        family = shape.family(shape.family.from_architecture(shape.architecture, dtype=dtype))
    family.model.requires_grad_(False)
    width = family.model.config.vision_config.hidden_size
    for name, parameter in family.tower.named_parameters():
        if name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):  # a query or key of a normalised token: variance 2.5
            parameter.normal_(std=(2.5 / width) ** 0.5)
    family.projector.float().requires_grad_(True)
    return family


class Noise:
    """Pictures of noise, made once, as `data.batches.media.Media`: uint8 with their levels, as a processor leaves them.

    Args:
        family: around the model.
        reducer: by which placeholders are counted.
    """

    def __init__(self, family: Family, reducer: Reducer) -> None:
        side = family.tile_side
        self.size = (TILES * side, TILES * side)
        num_tiles = family.num_tiles(self.size)
        tiles = (num_tiles,) if num_tiles > 1 else ()
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_PICTURES, *tiles, 3, side, side)
        self.pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self.lookup, self.num_tokens = (
            lookup_table("image", CLIPImageProcessorPil()),
            family.num_image_tokens(reducer, self.size),
        )

    def _inputs(self, pictures: Tensor) -> dict[str, Tensor]:
        sizes = {"image_sizes": torch.tensor([self.size] * len(pictures))} if pictures.dim() == 5 else {}
        return {"pixel_values": pictures, **sizes, LOOKUP: self.lookup}

    def load(self, kind: str, examples: Sequence[Example]) -> dict[str, Tensor]:
        """As `Media.load`."""
        numbers = [example.index % NUM_PICTURES for example in examples if kind in example.media]
        return self._inputs(self.pictures[numbers])

    def blank(self, kind: str) -> dict[str, Tensor]:
        """As `Media.blank`."""
        return self._inputs(torch.zeros_like(self.pictures[:1]))

    def counts(self, kind: str, inputs: dict[str, Tensor]) -> list[int]:
        """As `Media.counts`."""
        return [self.num_tokens] * len(inputs["pixel_values"])


def make_collator(family: Family, reducer: Reducer) -> Collator:
    """The collator of rows that `make_steps` returns."""
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=2))
    return Collator(processor, family, reducer, media=Noise(family, reducer))


def _row(
    text: np.ndarray, *, num_labels: int, image_id: int | None, index: int, size: tuple[int, int]
) -> Example:
    """A row of the ids `text`, behind whose prefix are an image, if there is one, and up to three questions with answers."""
    num_turns = min(MAX_TURNS, num_labels)
    questions = np.array_split(np.arange(len(text) - NUM_PREFIX - num_labels), num_turns)
    answers = np.array_split(np.arange(num_labels), num_turns)
    lengths = [len(part) for turn in zip(questions, answers, strict=True) for part in turn]
    learned = np.repeat([False, True] * num_turns, lengths)
    image = [] if image_id is None else [image_id]
    ids = [*text[:NUM_PREFIX].tolist(), *image, *text[NUM_PREFIX:].tolist()]
    labels = [IGNORED] * (NUM_PREFIX + len(image)) + np.where(learned, text[NUM_PREFIX:], IGNORED).tolist()
    return Example(
        ids, labels, {"image": (Path("noise"),)} if image else {}, sizes=(size,) * len(image), index=index
    )


def make_steps(family: Family, *, num_steps: int, num_examples: int, seed: int = 0) -> list[list[Example]]:
    """The rows of each step: lengths drawn from the recorded ones, each step with the mix's share of rows without a picture.

    Ids are random, but the first 35, which are the same. Of a row without a picture a third of the tokens are labels, as in the
    mean of the others; theirs are not recorded.
    """
    with np.load(LENGTHS) as recorded:
        texts, labels, alone = (
            recorded[name] for name in ("text_tokens", "label_tokens", "text_only_tokens")
        )
    generator = np.random.default_rng(seed)
    image_id, side = family.placeholder_id("image"), TILES * family.tile_side
    ids = np.setdiff1d(np.arange(FIRST_ID, family.model.config.text_config.vocab_size), [image_id])
    prefix = generator.choice(ids, NUM_PREFIX)
    num_alone = round(num_examples * len(alone) / (len(alone) + len(texts)))
    steps = []
    for _ in range(num_steps):
        places = generator.choice(len(texts), num_examples - num_alone, replace=False)
        drawn = [
            (length, count, image_id) for length, count in zip(texts[places], labels[places], strict=True)
        ]
        drawn += [(length, length // 3, None) for length in generator.choice(alone, num_alone, replace=False)]
        rows = []
        for index, (length, num_labels, image) in enumerate(drawn):
            text = np.concatenate([prefix, generator.choice(ids, length - NUM_PREFIX)])
            rows.append(
                _row(text, num_labels=int(num_labels), image_id=image, index=index, size=(side, side))
            )
        steps.append(rows)
    return steps


def necessary_tokens(example: Example, num_visual: int) -> int:
    """Tokens of a row with an image whose keys or output the gradient needs: those behind the prefix and before the last label.
    0 of other rows.
    """
    if not example.media:
        return 0
    last = max(place for place, label in enumerate(example.labels) if label != IGNORED)
    return last - 1 + num_visual - NUM_PREFIX


def necessary_flops(family: Family, reducer: Reducer, examples: Sequence[Example]) -> int:
    """Operations that the gradient of these rows needs, each once.

    The tower up to the tapped layer; the projector; the language model forward, and backward to its inputs, which are as many
    operations again, as its weights are frozen; its last layer, but for keys and values, and the head where a label follows.
    """
    size, text = (TILES * family.tile_side,) * 2, family.model.config.text_config
    num_visual, language = family.num_image_tokens(reducer, size), family.language_model
    picture = example_cost(
        family, reducer, num_tiles=family.num_tiles(size), num_visual_tokens=num_visual, num_text_tokens=0
    )
    last = language.layers[-1]
    keys = linear_flops(last.self_attn.k_proj) + linear_flops(last.self_attn.v_proj)
    labelled = linear_flops(last) - keys + linear_flops(family.lm_head)
    everywhere = linear_flops(language) - linear_flops(last) + keys
    total = 0
    for example in examples:
        if num_tokens := necessary_tokens(example, num_visual):
            seen = (
                attention_flops(text, NUM_PREFIX + num_tokens) - attention_flops(text, NUM_PREFIX)
            ) // 2  # causal
            total += picture.tower + picture.projector
            total += 2 * (num_tokens * everywhere + example.num_labels * labelled + seen)
    return total
