"""The loss of a micro batch in two ways that give the tuned weights the same gradient.

`ReferenceLoss` is the specification, and how stock trainers do it. `FastLoss` runs nothing that the gradient does not need.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batches.collate import MicroBatch, PackedBatch, PaddedBatch
from vzip.families import Family
from vzip.fast.language import PackedLanguage
from vzip.fast.loss import cross_entropy
from vzip.fast.segments import Prefix, Segments
from vzip.media import normalised
from vzip.patch import replaced_forwards
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED


def media_inputs(batch: MicroBatch, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's inputs of one kind of media, rescaled and normalised here, in the model's precision."""
    return normalised(batch.media[kind], dtype)


def embed(family: Family, reducer: Reducer, batch: MicroBatch) -> Tensor:
    """float[..., d_llm] of the ids int64[...]: what the language model receives."""
    dtype = family.model.dtype
    # Pictures first, whatever the rows hold, so that every rank runs the same modules in the same order.
    features = {
        kind: family.media_features(reducer, kind, media_inputs(batch, kind, dtype)) for kind in batch.media
    }
    embeddings: Tensor = family.model.get_input_embeddings()(batch.input_ids)
    for kind, found in features.items():
        if count := batch.num_placeholders[kind]:
            assert len(found) == count, f"{count} placeholders of {kind}s, {len(found)} features"
            at = (batch.input_ids == family.placeholder_id(kind)).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(at, found.to(embeddings.dtype))
        else:
            # Text alone gives the projector no gradient. But the ranks wait for each other in every module: a blank picture
            # goes through them, times zero.
            embeddings = embeddings + (0.0 * found.sum()).to(embeddings.dtype)
    return embeddings


class ReferenceLoss(nn.Module):
    """The plain way: padded rows through the stock language model, its layers checkpointed, logits of all tokens in float32.

    Args:
        family: around the model.
        reducer: of the pictures.
        learns_text: whether a row without a picture teaches the tuned weights anything, as it does LoRA in the language model.
    """

    def __init__(self, family: Family, reducer: Reducer, *, text_has_gradient: bool) -> None:
        super().__init__()
        self.family, self.model, self.reducer, self.text_has_gradient = (
            family,
            family.model,
            reducer,
            text_has_gradient,
        )

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """(sum of the cross entropy over all label tokens, the same of the rows that teach)."""
        embeddings, language = embed(self.family, self.reducer, batch), self.family.language_model
        checkpointed = {
            layer: partial(checkpoint, layer.forward, use_reentrant=False) for layer in language.layers
        }
        with replaced_forwards(checkpointed):
            output = language(inputs_embeds=embeddings, attention_mask=batch.attention_mask, use_cache=False)
        logits: Tensor = self.model.lm_head(output.last_hidden_state)[:, :-1]
        high = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = batch.labels[:, 1:]
        losses = F.cross_entropy(
            high.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        losses = losses.view_as(targets).sum(dim=1)
        placeholders = torch.tensor(
            [self.family.placeholder_id(kind) for kind in batch.media], device=losses.device
        )
        has_gradient = torch.isin(batch.input_ids, placeholders).any(dim=1) | self.text_has_gradient
        return losses.sum(), losses.detach()[has_gradient].sum()


class FastLoss(nn.Module):
    """The fast way: packed rows behind a prefix that is run once, and outputs where a label follows alone.

    Args:
        family: around the model.
        reducers: of the pictures; a micro batch says which is its own.
        prefix: ids that every row begins with, and that are not among the packed ones.
        settings: of `PackedLanguage`.
    """

    def __init__(
        self, family: Family, reducers: Sequence[Reducer], *, prefix: Sequence[int], **settings: bool
    ) -> None:
        super().__init__()
        self.family, self.model, self.reducers, self.prefix = family, family.model, reducers, prefix
        self.language = PackedLanguage(family.language_model, **settings)
        self._prefixes: list[Prefix] | None = None

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The sum of the cross entropy over the label tokens, twice: all of its rows teach."""
        if self._prefixes is None:
            self._prefixes = self.language.prefixes(self.prefix, batch.input_ids.device)
        embeddings = embed(self.family, self.reducers[batch.reducer], batch)
        hidden = self.language(embeddings, Segments(batch.lengths, self._prefixes), batch.at_labels)
        loss = cross_entropy(self.model.lm_head, hidden, batch.targets)
        if not batch.num_examples:
            loss = 0.0 * loss
        return loss, loss.detach()
