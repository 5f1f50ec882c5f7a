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
from vzip.families.features import LanguageInputs, VisualFeatures
from vzip.families.positions import first_of_rows
from vzip.fast.language import PackedLanguage
from vzip.fast.loss import cross_entropy
from vzip.fast.segments import Prefix, Segments
from vzip.patch import replaced_forwards
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED


def visual_features(family: Family, reducer: Reducer, batch: MicroBatch, kind: str) -> VisualFeatures:
    """Compute what the projector gets of all images, or all videos, of a micro batch."""
    # With a feature cache, the tower and the reducer have run before. Otherwise they run here.
    media = batch.media[kind]
    if isinstance(media, VisualFeatures):
        return media
    return family.visual_features(kind, media.normalized(family.model.dtype), reducer)


def visual_tokens(family: Family, reducer: Reducer, batch: MicroBatch, kind: str) -> Tensor:
    """Compute the visual tokens of all images, or all videos, of a micro batch: float[n, d_llm]."""
    return family.project(visual_features(family, reducer, batch, kind))


def language_inputs(
    family: Family, reducer: Reducer, batch: MicroBatch, *, counted: Tensor, first: Tensor
) -> LanguageInputs:
    """Turn the ids int64[...] of a micro batch into the language model's input.

    Visual tokens replace the placeholders.

    Args:
        family: the adapter around the model.
        reducer: reduces the pictures.
        batch: the micro batch.
        counted: bool[...], false for padding.
        first: int64[...], the index of the first token of each token's example.
    """
    # Project the pictures first, so that every rank runs the same modules in the same order,
    # whatever its examples hold.
    features = {kind: visual_features(family, reducer, batch, kind) for kind in batch.media}
    tokens = {kind: (family.project(media), *family.project_deep(media)) for kind, media in features.items()}

    # Embed all ids. The placeholders are embedded too, and replaced below. Some families (Qwen3-VL)
    # also add visual tokens to the outputs of the first layers: one tensor a layer, zero at text.
    embeddings: Tensor = family.model.get_input_embeddings()(batch.input_ids)
    num_added = max(len(of_kind) for of_kind in tokens.values()) - 1
    inputs = [embeddings, *[torch.zeros_like(embeddings) for _ in range(num_added)]]
    for kind, of_kind in tokens.items():
        num_placeholders = batch.num_placeholders[kind]
        is_placeholder = (batch.input_ids == family.placeholder_id(kind)).unsqueeze(-1)
        for number, values in enumerate(of_kind):
            if num_placeholders:
                assert len(values) == num_placeholders, (
                    f"{num_placeholders} placeholders of {kind}s, {len(values)} tokens"
                )
                inputs[number] = inputs[number].masked_scatter(is_placeholder, values.to(embeddings.dtype))
            else:
                # A micro batch without a picture holds a blank one. Its gradient is zero, but it
                # must run: under ZeRO 3 the ranks wait for each other in every module.
                inputs[number] = inputs[number] + (0.0 * values.sum()).to(embeddings.dtype)

    present = {kind: media for kind, media in features.items() if batch.num_placeholders[kind]}
    positions = family.positions(
        batch.input_ids.flatten(), present, counted=counted.flatten(), first=first.flatten()
    )
    if positions is not None:
        positions = positions.reshape(3, *batch.input_ids.shape)
    return LanguageInputs(inputs[0], positions, tuple(inputs[1:]))


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
        first = first_of_rows(batch.input_ids)
        counted = batch.attention_mask.bool()
        inputs = language_inputs(self.family, self.reducer, batch, counted=counted, first=first)

        # Checkpointing saves memory: each layer keeps only its input, and runs again in the
        # backward pass.
        language = self.family.language_model
        checkpointed = {}
        for layer in language.layers:
            checkpointed[layer] = partial(checkpoint, layer.forward, use_reentrant=False)
        with replaced_forwards(checkpointed):
            output = language(
                inputs_embeds=inputs.embeddings,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **self.family.language_arguments(inputs),
            )

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

        # Report the loss of the examples that have a gradient: without a picture, an example gives
        # the projector none.
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
        segments = Segments(batch.lengths, self.prefix_by_layer)
        counted = torch.ones_like(batch.input_ids, dtype=torch.bool)
        inputs = language_inputs(
            self.family, self.reducers[batch.reducer], batch, counted=counted, first=segments.first
        )

        # Attention sees the prefix before each example, and no other example.
        segments.set_positions(inputs.positions)
        hidden = self.language(inputs.embeddings, segments, batch.at_labels, added=inputs.added)

        # Logits are computed only where a label follows, in chunks, and never kept.
        loss = cross_entropy(self.model.lm_head, hidden, batch.targets)

        # A rank without examples runs a single token that counts as zero, so that all ranks run the
        # same modules.
        if not batch.num_examples:
            loss = 0.0 * loss
        return loss, loss.detach()
