"""Two losses of a micro batch that give the trainable parameters the same gradient.

`ReferenceLoss` is the specification: what stock trainers do. `FastLoss` runs nothing that the
gradient does not need:

- it packs examples in one sequence, so that no padding runs;
- it runs the prefix that all examples share only once, and keeps its keys and values;
- it computes logits only where a label follows, and never all of them at a time.

Legend of shapes: M examples of a micro batch, L tokens of the longest one, T tokens of packed
examples, n of them followed by a label, d_llm width of the language model.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batches.collate import MicroBatch, PackedBatch, PaddedBatch
from vzip.families import Family
from vzip.families.features import VisualFeatures
from vzip.fast.language import PackedLanguage
from vzip.fast.loss import cross_entropy
from vzip.fast.segments import Prefix, Segments
from vzip.patch import replaced_forwards
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED


def visual_tokens(family: Family, reducer: Reducer, batch: MicroBatch, kind: str) -> Tensor:
    """Compute the visual tokens of all images, or all videos, of a micro batch: float[n, d_llm]."""
    # With a feature cache, the tower and the reducer have run before. Otherwise they run here.
    media = batch.media[kind]
    if isinstance(media, VisualFeatures):
        features = media
    else:
        inputs = media.normalized(family.model.dtype)
        features = family.visual_features(kind, inputs, reducer)
    return family.project(features)


def embed(family: Family, reducer: Reducer, batch: MicroBatch) -> Tensor:
    """Turn the ids int64[...] of a micro batch into the language model's input: float[..., d_llm].

    Visual tokens replace the placeholders.
    """
    # Project the pictures first, so that every rank runs the same modules in the same order,
    # whatever its examples hold.
    tokens_by_kind = {kind: visual_tokens(family, reducer, batch, kind) for kind in batch.media}

    # Embed all ids. The placeholders are embedded too, and replaced below.
    embeddings: Tensor = family.model.get_input_embeddings()(batch.input_ids)
    for kind, tokens in tokens_by_kind.items():
        num_placeholders = batch.num_placeholders[kind]
        if num_placeholders:
            assert len(tokens) == num_placeholders, (
                f"{num_placeholders} placeholders of {kind}s, {len(tokens)} tokens"
            )
            is_placeholder = batch.input_ids == family.placeholder_id(kind)
            embeddings = embeddings.masked_scatter(is_placeholder.unsqueeze(-1), tokens.to(embeddings.dtype))
        else:
            # A micro batch without a picture holds a blank one. Its gradient is zero, but it must
            # run: under ZeRO 3 the ranks wait for each other in every module.
            embeddings = embeddings + (0.0 * tokens.sum()).to(embeddings.dtype)
    return embeddings


class ReferenceLoss(nn.Module):
    """Padded examples through the stock language model, and float32 logits of all tokens.

    Args:
        family: the adapter around the model.
        reducer: reduces the pictures.
        text_has_gradient: whether the trainable parameters also learn from examples without a
            picture, as LoRA in the language model does.
    """

    def __init__(self, family: Family, reducer: Reducer, *, text_has_gradient: bool) -> None:
        super().__init__()
        self.family = family
        self.model = family.model
        self.reducer = reducer
        self.text_has_gradient = text_has_gradient

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
        """Compute the cross entropy, summed over label tokens.

        Returns:
            (sum over all examples, sum over those that the trainable parameters learn from)
        """
        embeddings = embed(self.family, self.reducer, batch)

        # Checkpointing saves memory: each layer keeps only its input, and runs again in the
        # backward pass.
        language = self.family.language_model
        checkpointed = {}
        for layer in language.layers:
            checkpointed[layer] = partial(checkpoint, layer.forward, use_reentrant=False)
        with replaced_forwards(checkpointed):
            output = language(inputs_embeds=embeddings, attention_mask=batch.attention_mask, use_cache=False)

        # The float32 logits of all tokens are the largest tensor of this path.
        logits: Tensor = self.model.lm_head(output.last_hidden_state)

        # The output at a token predicts the next token, so outputs and labels are shifted by one.
        logits = logits[:, :-1]
        targets = batch.labels[:, 1:]
        losses = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        loss_by_example = losses.view_as(targets).sum(dim=1)

        # Report the loss of the examples that teach something: without a picture, an example gives
        # the projector no gradient.
        placeholders = [self.family.placeholder_id(kind) for kind in batch.media]
        is_placeholder = torch.isin(batch.input_ids, torch.tensor(placeholders, device=losses.device))
        has_gradient = is_placeholder.any(dim=1) | self.text_has_gradient
        return loss_by_example.sum(), loss_by_example.detach()[has_gradient].sum()


class FastLoss(nn.Module):
    """Packed examples behind a shared prefix, and logits only where a label follows.

    Call `run_prefix` before the first forward.

    Args:
        family: the adapter around the model.
        reducers: reduce the pictures. Each micro batch names the one that it uses.
        prefix: ids that every example begins with. The packed examples leave them out.
        settings: settings of `PackedLanguage`.
    """

    def __init__(
        self, family: Family, reducers: Sequence[Reducer], *, prefix: Sequence[int], **settings: bool
    ) -> None:
        super().__init__()
        self.family = family
        self.model = family.model
        self.reducers = reducers
        self.prefix = prefix
        self.language = PackedLanguage(family.language_model, **settings)
        self.prefix_by_layer: list[Prefix] = []

    def run_prefix(self, device: torch.device) -> None:
        """Compute the keys and values of the prefix, once the model is on its device.

        Only frozen weights take part, so training does not change them.
        """
        self.prefix_by_layer = self.language.prefixes(self.prefix, device)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Compute the cross entropy, summed over label tokens.

        Returns:
            (the sum, the same sum without a gradient): all packed examples have a gradient
        """
        # A micro batch belongs to one of the budgets.
        embeddings = embed(self.family, self.reducers[batch.reducer], batch)

        # Attention sees the prefix before each example, and no other example.
        segments = Segments(batch.lengths, self.prefix_by_layer)
        hidden = self.language(embeddings, segments, batch.at_labels)

        # Logits are computed only where a label follows, in chunks, and never kept.
        loss = cross_entropy(self.model.lm_head, hidden, batch.targets)

        # A rank without examples runs a single token that counts as zero, so that all ranks run the
        # same modules.
        if not batch.num_examples:
            loss = 0.0 * loss
        return loss, loss.detach()
