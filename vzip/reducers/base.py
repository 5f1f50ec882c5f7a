"""What a reducer is given and what it returns.

Legend of shapes: B images (or tiles), N vision tokens (CLS first, where there is one), P patches, d encoder width,
T tokens that leave the reducer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from vzip.errors import UserError, check_count

ANYRES = ("released", "spatial")
"""Orders of the tokens of several tiles that a reducer can choose."""


def budget_of_a_tile(budget: int, tiles: int) -> int:
    """The share of one tile in a budget that is the total of `tiles`. Raises UserError if it is none, or can't be shared."""
    check_count("reducer.budget", budget, 1)
    if budget % tiles:
        below, above = budget // tiles * tiles, -(-budget // tiles) * tiles
        raise UserError(
            f"reducer.budget={budget} is the total of an image of {tiles} tiles, and no multiple of {tiles}; "
            f"choose {f'{below} or ' if below else ''}{above}"
        )
    return budget // tiles


@dataclass(frozen=True)
class VisionTokens:
    """The tokens of one encoder layer, and what its attention says of them."""

    features: Tensor
    """float[B, N, d]: the layer's output."""
    has_cls: bool
    """Token 0 is CLS; the other N - 1 are patches in raster order."""
    num_dropped: int = 0
    """Leading tokens that the model itself, without a reducer, leaves out (LLaVA: 1, the CLS)."""
    saliency: Tensor | None = None
    """float32[B, P]: attention that each patch receives; None unless the reducer asked for it."""
    keys: Tensor | None = None
    """float[B, N, head_dim]: raw keys of the layer's attention, averaged over heads; None as above."""


@dataclass(frozen=True)
class ReducerOutput:
    """The tokens that leave a reducer, and where every vision token went."""

    features: Tensor
    """float[B, T, d]: dominant tokens in raster order (CLS first), then contextual tokens in target order."""
    dominant: Tensor
    """int64[B, D]: indices into the N vision tokens, in raster order."""
    contextual: Tensor
    """int64[B, C]: indices of the merge targets, in raster order."""
    slots: Tensor
    """int64[B, N]: the output token that holds each vision token, -1 for a dropped one."""


class Reducer(Protocol):
    """A pure function on vision tokens. "Off" is an object too (`Identity`), so callers never branch.

    A constructor that takes `budget` takes `tiles` too, of how many pictures it is the total: see `budget_of_a_tile`.
    """

    name: ClassVar[str]
    """The module's name in `vzip.reducers`, as checkpoints record it."""
    uses_attention: ClassVar[bool]
    """Whether `VisionTokens.saliency` and `.keys` have to be computed."""
    layer: int | None
    """The hidden state whose layer's attention is read, as LLaVA's `vision_feature_layer`; None: the one of the features."""
    anyres: str
    """Order of the tokens of several tiles, see `vzip.families.anyres`: "released", "spatial", or "model" (the model's own)."""

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        """T for an image of `num_patches` patches. Raises UserError if the image has too few."""
        ...

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that give this reducer again; JSON types only."""
        ...

    def __call__(self, tokens: VisionTokens) -> ReducerOutput: ...
