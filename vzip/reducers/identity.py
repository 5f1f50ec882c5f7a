"""No reduction: the tokens that the model itself would use, bit for bit."""

from typing import Any, ClassVar

import torch

from vzip.reducers.base import ReducerOutput, VisionTokens


class Identity:
    """Keep every token that the model itself keeps (LLaVA: all patches, without the CLS)."""

    name: ClassVar[str] = "identity"
    uses_attention: ClassVar[bool] = False
    layer: int | None = None

    def __repr__(self) -> str:
        return "Identity(all tokens)"

    def settings(self) -> dict[str, Any]:
        return {}

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        return num_patches + int(has_cls) - num_dropped

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        # Tokens keep their order. Only those that the model drops itself (LLaVA: CLS) are left out.
        num_images, num_tokens, _ = tokens.features.shape
        index = torch.arange(num_tokens, device=tokens.features.device).expand(num_images, -1)
        return ReducerOutput(
            features=tokens.features[:, tokens.num_dropped :],
            dominant=index[:, tokens.num_dropped :],
            contextual=index[:, :0],
            slots=(index - tokens.num_dropped).clamp(min=-1),
        )
