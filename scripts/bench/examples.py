"""Examples for the benchmark of tuning: random ids of the recorded lengths, and pictures of noise.

It also counts the tokens and operations that the gradient needs, each once: the necessary work.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil

from data.batches.collate import Collator
from data.examples.tokens import Example, Examples
from vzip.cost import attention_flops, example_cost, linear_flops
from vzip.families import Family
from vzip.media import MediaInputs, lookup_table
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED

# Text and label tokens of each of the 66,529 examples of a tenth of LLaVA's mix.
# They are estimated from published counts.
LENGTHS = Path(__file__).with_name("mix665k_tenth_lengths.npz")

# Tokens that each of these examples begins with: BOS, the system prompt, and "USER: ".
NUM_PREFIX = 35

# The most questions of an example.
MAX_TURNS = 3

# Different pictures of noise.
NUM_PICTURES = 16

# Llama's special tokens, which have the first ids.
NUM_SPECIAL_IDS = 3

# Tiles on each side of a picture, for models that cut pictures. Most pictures of the mix have them.
TILES = 2


class Noise:
    """Pictures of noise that are made once, as a `data.batches.media.Media`.

    Args:
        family: around the model.
        reducer: decides the number of placeholders.
    """

    def __init__(self, family: Family, reducer: Reducer) -> None:
        side = family.tile_side
        self.size = (TILES * side, TILES * side)
        self.num_tokens = family.num_image_tokens(reducer, self.size)
        self.lookup = lookup_table("image", CLIPImageProcessorPil())

        # uint8[NUM_PICTURES, (tiles,) 3, side, side]: only models that cut pictures have tiles.
        num_tiles = family.num_tiles(self.size)
        tiles = (num_tiles,) if num_tiles > 1 else ()
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randint(
            256, (NUM_PICTURES, *tiles, 3, side, side), dtype=torch.uint8, generator=generator
        )

    def _inputs(self, pictures: Tensor) -> MediaInputs:
        """Wrap pictures as a processor's output."""
        # A model that cuts pictures also needs their sizes, to put the tiles together.
        is_tiled = pictures.dim() == 5
        extra = {"image_sizes": torch.tensor([self.size] * len(pictures))} if is_tiled else {}
        return MediaInputs(pictures, extra, self.lookup)

    def load(self, kind: str, examples: Sequence[Example]) -> MediaInputs:
        """Implement `Media.load`."""
        # Examples share a few pictures: the time to run one does not depend on what it shows.
        numbers = [example.index % NUM_PICTURES for example in examples if kind in example.media]
        return self._inputs(self.pictures[numbers])

    def blank(self, kind: str) -> MediaInputs:
        """Implement `Media.blank`."""
        return self._inputs(torch.zeros_like(self.pictures[:1]))

    def counts(self, kind: str, inputs: MediaInputs) -> list[int]:
        """Implement `Media.counts`."""
        return [self.num_tokens] * inputs.num_media


def make_collator(family: Family, reducer: Reducer) -> Collator:
    """Make the collator of the examples that `make_examples` returns."""
    # A collator reads only the ids for padding from the processor: `Noise` makes the pictures.
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=2))
    return Collator(processor, family, reducer, media=Noise(family, reducer))


def make_examples(family: Family, *, num_examples: int, seed: int = 0) -> Examples:
    """Draw examples with the recorded lengths and the mix's share of examples without a picture.

    Ids are random, but all examples have the same first 35. In an example without a picture, a
    third of the tokens are labels. That is the mean of the other examples: the real number was not
    recorded.
    """
    with np.load(LENGTHS) as recorded:
        text_lengths = recorded["text_tokens"]
        label_lengths = recorded["label_tokens"]
        lengths_without_picture = recorded["text_only_tokens"]

    # Draw text ids from all but the special ones and the placeholder, which have other meanings.
    generator = np.random.default_rng(seed)
    image_id = family.placeholder_id("image")
    vocabulary = np.arange(NUM_SPECIAL_IDS, family.model.config.text_config.vocab_size)
    vocabulary = vocabulary[vocabulary != image_id]
    prefix = generator.choice(vocabulary, NUM_PREFIX)
    side = TILES * family.tile_side

    def draw(length: int, num_labels: int, image: int | None) -> Example:
        text = np.concatenate([prefix, generator.choice(vocabulary, length - NUM_PREFIX)])
        return _example(text, int(num_labels), image, size=(side, side))

    # Keep the mix's share of examples without a picture: the fast path does not run them.
    num_recorded = len(text_lengths) + len(lengths_without_picture)
    num_without = round(num_examples * len(lengths_without_picture) / num_recorded)
    examples = []
    for position in generator.choice(len(text_lengths), num_examples - num_without):
        examples.append(draw(text_lengths[position], label_lengths[position], image_id))
    for length in generator.choice(lengths_without_picture, num_without):
        examples.append(draw(length, length // 3, None))

    return Examples.of(examples)


def _example(text: np.ndarray, num_labels: int, image: int | None, *, size: tuple[int, int]) -> Example:
    """Build an example: the prefix, the image if there is one, then questions and answers in turn.

    Args:
        text: int64[tokens], all ids except the image's.
        num_labels: tokens of the answers together.
        image: id of the image's placeholder.
        size: (height, width) of the image.
    """
    # Each answer needs a label, so an example with few labels has fewer turns.
    num_turns = min(MAX_TURNS, num_labels)
    num_questions = len(text) - NUM_PREFIX - num_labels
    labels = np.full(len(text), IGNORED)

    # Questions and answers alternate. Only answers are labels.
    stop = NUM_PREFIX
    turns = zip(_even_parts(num_questions, num_turns), _even_parts(num_labels, num_turns), strict=True)
    for question, answer in turns:
        start = stop + question
        stop = start + answer
        labels[start:stop] = text[start:stop]

    ids = text.tolist()
    targets = labels.tolist()
    if image is None:
        return Example(ids, targets, media={})

    # The image comes first in the first question, and is no label.
    ids.insert(NUM_PREFIX, image)
    targets.insert(NUM_PREFIX, IGNORED)
    return Example(ids, targets, media={"image": (Path("noise"),)}, sizes=(size,))


def _even_parts(total: int, num_parts: int) -> list[int]:
    """Split a number into parts that differ by 1 at most."""
    return [len(part) for part in np.array_split(np.arange(total), num_parts)]


def necessary_tokens(example: Example, num_visual: int) -> int:
    """Count the tokens of an example that must run for the gradient.

    They lie between the prefix and the last label. In an example without an image nothing must run.
    """
    if not example.media:
        return 0

    # The token before the last label predicts it, and is the last one that must run. The
    # placeholder counts as all visual tokens.
    labelled = [position for position, label in enumerate(example.labels) if label != IGNORED]
    return labelled[-1] - 1 + num_visual - NUM_PREFIX


def necessary_flops(family: Family, reducer: Reducer, examples: Sequence[Example]) -> int:
    """Count the operations that the gradient of some examples needs, each once.

    The gradient needs the tower up to the hooked layer, the projector, and the language model forward
    and backward. The language model is frozen, so its backward pass, which goes to its inputs, takes
    the same number of operations as the forward pass. The head and most of the last layer are needed
    only where a label follows: other tokens need that layer's keys and values.
    """
    # Tower and projector, for one picture.
    size = (TILES * family.tile_side, TILES * family.tile_side)
    num_visual = family.num_image_tokens(reducer, size)
    picture = example_cost(
        family,
        reducer,
        num_tiles=family.num_tiles(size),
        num_visual_tokens=num_visual,
        num_text_tokens=0,
    )

    # All tokens go through all layers but the last. There most tokens need only keys and values.
    text_config = family.model.config.text_config
    language = family.language_model
    last_layer = language.layers[-1]
    keys_and_values = linear_flops(last_layer.self_attn.k_proj) + linear_flops(last_layer.self_attn.v_proj)
    per_token = linear_flops(language) - linear_flops(last_layer) + keys_and_values
    per_label = linear_flops(last_layer) - keys_and_values + linear_flops(family.lm_head)

    total = 0
    for example in examples:
        num_tokens = necessary_tokens(example, num_visual)
        if not num_tokens:
            continue

        # Attention is causal, so half of the full matrix counts. The prefix's own part does not,
        # because it runs only once for all examples.
        attention = attention_flops(text_config, NUM_PREFIX + num_tokens)
        attention -= attention_flops(text_config, NUM_PREFIX)
        forward = num_tokens * per_token + example.num_labels * per_label + attention // 2
        total += picture.tower + picture.projector + 2 * forward

    return total
