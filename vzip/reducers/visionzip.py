"""VisionZip: keep the patches that receive most of the attention, and merge the others.

For each picture:

1. *Dominant* tokens: CLS, and the D - 1 patches with the highest saliency, which is the attention
   that CLS pays them.
2. *Contextual* tokens: every k-th of the remaining patches is a merge target, C in all. Every other
   patch is merged into the target with the most similar key.

Source: arXiv 2412.04467, section 3, and the authors' released code (repository
dvlab-research/VisionZip, `visionzip/clip_encoder.py`), whose results this module reproduces.
`vzip/reducers/merging.py` merges, for other reducers too.

Legend of shapes: see `vzip/reducers/base.py`.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from vzip.errors import UserError, check_choice, check_count
from vzip.reducers.base import ReducerOutput, VisionTokens, budget_of_a_tile, check_keep, share_of
from vzip.reducers.merging import MERGES, keep_and_merge, split_budget


def select_dominant(saliency: Tensor, num_dominant: int, *, has_cls: bool, keep_cls: bool) -> Tensor:
    """Select the dominant tokens: CLS, if there is one to keep, and the most salient patches.

    Of equally salient patches the first in raster order wins, on every device.

    Args:
        saliency: float[B, P].
        num_dominant: D, CLS included.
        has_cls: whether token 0 is CLS.
        keep_cls: whether CLS is kept.

    Returns:
        int64[B, D]: indices into the N vision tokens, in raster order.
    """
    with_cls = has_cls and keep_cls and num_dominant > 0
    num_patches = num_dominant - int(with_cls)

    # A stable sort gives ties to the first patch in raster order.
    by_saliency = saliency.argsort(dim=1, descending=True, stable=True)
    in_raster_order = by_saliency[:, :num_patches].sort(dim=1).values

    # From patches to tokens: patch 0 is token 1 if CLS comes first.
    dominant = in_raster_order + int(has_cls)
    return F.pad(dominant, (1, 0), value=0) if with_cls else dominant


@dataclass(init=False)
class VisionZip:
    """Reduce each image, or each tile, to D dominant tokens (CLS included) and C contextual ones.

    Args:
        budget: D + C of `tiles` tiles together, split at the paper's ratio. Or give both `dominant`
            and `contextual`.
        tiles: number of tiles that the budget counts together; LLaVA-NeXT's counts 5.
        dominant: D of one tile.
        contextual: C of one tile.
        keep: share of a picture's patches that remain, split like a budget. Instead of all of these.
        merge: see the attribute, like the ones that follow.
        keep_cls: whether CLS is one of the dominant tokens.
        layer: hidden state whose layer's attention is read.

    Raises:
        UserError: counts that contradict each other, or a value that does not exist.
    """

    name: ClassVar[str] = "visionzip"
    uses_attention: ClassVar[bool] = True

    dominant: int
    """D of one tile. With 0, the CLS is dropped too."""
    contextual: int
    """C of one tile."""
    merge: str = "sum"
    """"sum" (the released code, and so the published numbers) or "average" (the paper's text)."""
    keep_cls: bool = True
    """Whether CLS is one of the dominant tokens."""
    layer: int | None = None
    """Hidden state whose layer's attention is read; None: that of the features, as in the paper."""
    keep: float | None = None
    """Share of a picture's patches that remain. If it is given, D and C above are 0."""

    def __init__(  # noqa: PLR0913  all of them are settings
        self,
        *,
        budget: int | None = None,
        tiles: int = 1,
        dominant: int | None = None,
        contextual: int | None = None,
        merge: str = "sum",
        keep_cls: bool = True,
        layer: int | None = None,
        keep: float | None = None,
    ) -> None:
        check_choice("reducer.merge", merge, MERGES)
        check_choice("reducer.keep_cls", keep_cls, (True, False))
        self.merge = merge
        self.keep_cls = keep_cls
        self.layer = layer

        check_keep(keep, budget=budget, dominant=dominant, contextual=contextual)
        self.keep = keep

        # An error message shows the budget the way the user gave it.
        self._tiles = 1 if budget is None else tiles

        # A share is turned into counts when the size of a picture is known.
        if keep is not None:
            self.dominant = self.contextual = 0
            return

        # The counts of one tile are given, or follow from the budget. Only they are stored.
        tile_budget = None if budget is None else budget_of_a_tile(budget, tiles)
        if tile_budget is not None and dominant is None and contextual is None:
            dominant, contextual = split_budget(tile_budget)
        if dominant is None or contextual is None:
            raise UserError(
                f"give reducer.budget, or both reducer.dominant and reducer.contextual "
                f"(got budget={budget}, dominant={dominant}, contextual={contextual})"
            )

        check_count("reducer.dominant", dominant, 0)
        check_count("reducer.contextual", contextual, 0)
        self.dominant = dominant
        self.contextual = contextual
        self._check_total(budget, tile_budget, tiles)

    def _check_total(self, budget: int | None, tile_budget: int | None, tiles: int) -> None:
        """Raise UserError if D + C is 0, or differs from the budget."""
        total = self.dominant + self.contextual
        if total == 0:
            raise UserError(
                "reducer.dominant=0 and reducer.contextual=0 keep nothing; one of them must be at least 1"
            )
        if tile_budget is not None and tile_budget != total:
            of_tiles = f" of each of {tiles} tiles" if tiles > 1 else ""
            raise UserError(
                f"reducer.budget={budget} is not dominant + contextual = "
                f"{self.dominant} + {self.contextual} = {total}{of_tiles}; "
                f"set reducer.budget={total * tiles} (or null), or leave dominant and contextual out"
            )

    def __repr__(self) -> str:
        shown = [f"{self.dominant} dominant + {self.contextual} contextual"]
        if self.keep is not None:
            shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("dominant", "contextual") and value != field.default:
                shown.append(f"{field.name}={value}")
        return f"VisionZip({', '.join(shown)})"

    def settings(self) -> dict[str, Any]:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.keep is None:
            del settings["keep"]
        else:
            del settings["dominant"], settings["contextual"]
        return settings

    def counts(self, num_patches: int) -> tuple[int, int]:
        """Return D and C for a picture of `num_patches` patches."""
        if self.keep is None:
            return self.dominant, self.contextual
        return split_budget(share_of(self.keep, num_patches))

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        # CLS can be kept beside the patches, but is never merged.
        num_dominant, num_contextual = self.counts(num_patches)
        num_tokens = num_dominant + num_contextual
        keeps_cls = has_cls and self.keep_cls and num_dominant > 0
        available = num_patches + int(keeps_cls)
        if num_tokens <= available:
            return num_tokens

        and_cls = " and a CLS token" if keeps_cls else ""
        in_total = ""
        if self._tiles > 1:
            in_total = f", a total of at most {available * self._tiles} for {self._tiles} tiles"
        raise UserError(
            f"reducer.budget={num_tokens * self._tiles} "
            f"({self.dominant} dominant + {self.contextual} contextual a picture) is larger than "
            f"the {available} tokens of a picture ({num_patches} patches{and_cls}); "
            f"choose at most {available}{in_total}"
        )

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        saliency = tokens.saliency
        assert saliency is not None and tokens.keys is not None, "VisionZip reads the layer's attention"

        has_cls = tokens.has_cls

        # Refuse a picture with fewer patches than the budget, such as a tile of another size.
        self.num_tokens(saliency.shape[1], has_cls=has_cls, num_dropped=tokens.num_dropped)
        num_dominant, num_contextual = self.counts(saliency.shape[1])

        # Dominant tokens are kept unchanged, and the others are merged.
        dominant = select_dominant(saliency, num_dominant, has_cls=has_cls, keep_cls=self.keep_cls)
        return keep_and_merge(tokens, dominant, num_contextual, how=self.merge)
