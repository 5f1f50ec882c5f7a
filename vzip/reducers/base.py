"""The input and the output of a reducer, and the protocol that all reducers follow.

Legend of shapes: B images (or tiles); N vision tokens (CLS first, if there is one), of which P are
patches; d width of the tower; D dominant and C contextual tokens; T tokens that leave the reducer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from vzip.errors import UserError, check_count


def budget_of_a_tile(budget: int, tiles: int) -> int:
    """Divide a budget among the tiles that it counts together.

    Raises:
        UserError: a budget below 1, or one that is no multiple of `tiles`.
    """
    check_count("reducer.budget", budget, 1)
    if budget % tiles == 0:
        return budget // tiles

    # Propose the nearest multiples. The lower one may be 0, which is not a budget.
    above = (budget // tiles + 1) * tiles
    below = above - tiles
    choices = f"{below} or {above}" if below else f"{above}"
    raise UserError(
        f"reducer.budget={budget} is the total of an image of {tiles} tiles, "
        f"and no multiple of {tiles}; choose {choices}"
    )


def check_keep(keep: float | None, **others: int | None) -> None:
    """Check the share of a picture's tokens that a reducer keeps.

    Args:
        keep: the share; None if another setting gives a number.
        others: the settings that give a number.

    Raises:
        UserError: a share outside of (0, 1], or a share and a number.
    """
    if keep is None:
        return

    is_number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if not is_number or not 0 < keep <= 1:
        raise UserError(f"reducer.keep={keep} is no share of a picture's tokens; choose one above 0, up to 1")
    given = [f"reducer.{name}={value}" for name, value in others.items() if value is not None]
    if given:
        raise UserError(f"give either reducer.keep={keep} or {', '.join(given)}, not both")


def share_of(keep: float, num_patches: int) -> int:
    """Count the tokens that remain of a picture if it keeps a share of them: at least one."""
    return max(1, round(keep * num_patches))


@dataclass(frozen=True)
class VisionTokens:
    """The tokens of one layer of the vision tower, and the attention that they receive."""

    features: Tensor
    """float[B, N, d]: the layer's output."""
    has_cls: bool
    """Whether token 0 is CLS. The other tokens are patches in raster order."""
    num_dropped: int = 0
    """Leading tokens that the model drops when there is no reducer (LLaVA: 1, the CLS)."""
    saliency: Tensor | None = None
    """float32[B, P]: attention that each patch receives; None unless the reducer asked for it."""
    keys: Tensor | None = None
    """float[B, N, head_dim]: keys of the layer's attention, averaged over heads; None as above."""
    received: tuple[Tensor, ...] = ()
    """float32[B, P] of each of `received_layers`: attention that each patch receives in that layer,
    averaged over heads and over the queries of all tokens, CLS included."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the patches; None for a square."""

    @property
    def num_patches(self) -> int:
        """P, the number of tokens without CLS."""
        return self.features.shape[1] - int(self.has_cls)

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """The grid of the patches. Raises UserError if they are no square and no grid is given."""
        side = math.isqrt(self.num_patches)
        rows, columns = self.grid or (side, side)
        if rows * columns != self.num_patches:
            raise UserError(
                f"VisionTokens of {self.num_patches} patches with grid={self.grid}: the rows and columns of "
                f"the patches are unknown; give grid=(rows, columns)"
            )
        return rows, columns

    def without_cls(self) -> "VisionTokens":
        """Return the patches alone."""
        first = int(self.has_cls)
        return replace(
            self,
            features=self.features[:, first:],
            keys=None if self.keys is None else self.keys[:, first:],
            has_cls=False,
            num_dropped=0,
        )


@dataclass(frozen=True)
class ReducerOutput:
    """The tokens that leave a reducer, and what became of every vision token."""

    features: Tensor
    """float[B, T, d]: dominant tokens in raster order (CLS first), then contextual tokens."""
    dominant: Tensor
    """int64[B, D]: indices into the N vision tokens, in raster order."""
    contextual: Tensor
    """int64[B, C]: indices of the merge targets, in raster order."""
    slots: Tensor
    """int64[B, N]: the output token that holds each vision token, -1 for a dropped one."""


class Reducer(Protocol):
    """A function of vision tokens, without state.

    "No reduction" is a reducer too (`Identity`), so callers never branch. If the constructor takes
    `budget`, it also takes `tiles`, the number of tiles that the budget counts together.
    """

    name: ClassVar[str]
    """The module's name in `vzip.reducers`, which checkpoints record."""
    layer: int | None
    """Hidden state whose layer's attention is read; None for `vision_feature_layer` itself."""

    @property
    def uses_attention(self) -> bool:
        """Whether `VisionTokens.saliency` and `VisionTokens.keys` must be computed."""
        ...

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        """Return T for an image of `num_patches` patches. Raises UserError if it has too few."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return constructor arguments that make this reducer again; JSON types only."""
        ...

    def __call__(self, tokens: VisionTokens) -> ReducerOutput: ...


def received_layers(reducer: Reducer, layers: Sequence[int]) -> tuple[int | None, ...]:
    """Return the hidden states whose layers' `VisionTokens.received` a reducer reads.

    Most reducers read none. One that does has a method `received_layers(layers)`.

    Args:
        reducer: any reducer.
        layers: hidden states that the tower can give it for, from 1 on.

    Returns:
        Hidden states in the order of `VisionTokens.received`; None for that of the features.
    """
    choose = getattr(reducer, "received_layers", None)
    return () if choose is None else choose(layers)


class Budgeted:
    """What reducers with a budget share. It counts patches: CLS is dropped.

    Args:
        budget: tokens to keep of `tiles` tiles together.
        tiles: number of tiles that the budget counts together.
        keep: share of a picture's patches to keep, instead of a budget.

    Raises:
        UserError: a budget below 1 per tile, or one that does not divide among the tiles; or a share
            outside of (0, 1].
    """

    uses_attention: bool = False
    layer: int | None = None

    def __init__(self, *, budget: int | None = None, tiles: int = 1, keep: float | None = None) -> None:
        check_keep(keep, budget=budget)
        if keep is None and budget is None:
            raise UserError("give reducer.budget, or reducer.keep as a share of a picture's patches")
        self.keep = keep
        self.budget = 0 if budget is None else budget_of_a_tile(budget, tiles)

    def __repr__(self) -> str:
        # Options that are not set are left out.
        amount = f"{self.budget} patches" if self.keep is None else f"{self.keep} of the patches"
        shown = [amount]
        for name, value in self.settings().items():
            if name not in ("budget", "keep") and value is not None:
                shown.append(f"{name}={value}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this reducer again."""
        return {"budget": self.budget} if self.keep is None else {"keep": self.keep}

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        """Return T. Raises UserError for a picture of fewer patches."""
        if self.keep is not None:
            return share_of(self.keep, num_patches)
        if self.budget > num_patches:
            raise UserError(
                f"reducer.budget={self.budget} is larger than the {num_patches} patches "
                f"of an image; choose a budget of at most {num_patches}"
            )
        return self.budget

    def num_kept(self, tokens: VisionTokens) -> int:
        """Return T for these tokens. Raises UserError if there are fewer, as in a smaller tile."""
        return self.num_tokens(tokens.num_patches, has_cls=tokens.has_cls, num_dropped=tokens.num_dropped)
