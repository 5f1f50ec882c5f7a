"""FasterVLM: select the patches that receive most of CLS's attention.

These are VisionZip's dominant tokens without CLS, and nothing is merged. A tower without CLS gives
the attention that all patches pay instead, as in VisionZip.

Source: arXiv 2412.01818, and the authors' released code (repository Theia-4869/FasterVLM,
`llava/model/llava_arch.py`), whose selections this module reproduces.
"""

from typing import ClassVar

from torch import Tensor

from vzip.reducers.base import VisionTokens
from vzip.reducers.selection import Selector, most_salient, required_saliency


class FasterVLM(Selector):
    """Keep the most salient patches. The settings are those of `Selector`."""

    name: ClassVar[str] = "fastervlm"
    uses_attention = True

    def select(self, tokens: VisionTokens, num_selected: int) -> Tensor:
        return most_salient(required_saliency(tokens, self.name), num_selected)
