"""DeepSpeed around the model: the loss of a micro batch, and an engine of any ZeRO stage.

The frozen weights stay in bf16 and the tuned ones are float32 parameters, their own master weights. DeepSpeed is told of no
precision at all: its bf16 mode would cast them, and keeps master weights in some ZeRO stages but not in others.
"""

from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from data.dataset import MicroBatch
from train.trainable import Trainable
from vzip import UserError
from vzip.families import Family
from vzip.media import normalised
from vzip.templates import IGNORED


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The batch with its tensors on the device; from pinned memory, while other work goes on."""
    return batch.each(lambda values: values.to(device, non_blocking=True))


def media_inputs(batch: MicroBatch, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's inputs of one kind of media, rescaled and normalised here, in the model's precision."""
    return normalised(batch.media[kind], dtype)


class TokenLoss(nn.Module):
    """Sum of the cross entropy over the label tokens of a micro batch; logits are made at those positions alone.

    Args:
        family: around the model, with the reducer attached.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family, self.model = family, family.model

    def forward(self, batch: MicroBatch) -> Tensor:
        inner, dtype = self.model.model, self.model.dtype
        # Pictures first, whatever the rows hold, so that every rank runs the same modules in the same order.
        features = {kind: self.family.media_features(kind, media_inputs(batch, kind, dtype)) for kind in batch.media}
        embeddings = inner.get_input_embeddings()(batch.input_ids)
        for kind, found in features.items():
            if count := batch.num_placeholders[kind]:
                assert len(found) == count, f"{count} placeholders of {kind}s, {len(found)} features"
                at = (batch.input_ids == self.family.placeholder_id(kind)).unsqueeze(-1)
                embeddings = embeddings.masked_scatter(at, found.to(embeddings.dtype))
            else:
                # Text alone gives the projector no gradient. But the ranks wait for each other in every module: a blank
                # picture goes through them, times zero.
                embeddings = embeddings + 0.0 * found.sum().to(embeddings.dtype)
        output = inner.language_model(inputs_embeds=embeddings, attention_mask=batch.attention_mask, use_cache=False)
        targets = batch.labels[:, 1:]
        at_labels = targets != IGNORED
        logits = self.model.lm_head(output.last_hidden_state[:, :-1][at_labels])
        return F.cross_entropy(logits.float(), targets[at_labels], reduction="sum")


def deepspeed_config(cfg: DictConfig, *, accumulation: int) -> dict[str, Any]:
    """The group `deepspeed`, completed with what the other settings say."""
    settings = OmegaConf.to_container(cfg.deepspeed, resolve=True)
    assert isinstance(settings, dict)
    return {
        **{str(key): value for key, value in settings.items()},
        "train_micro_batch_size_per_gpu": cfg.batch.micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": cfg.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


class Engine:
    """One optimizer step at a time, on the mean loss over the label tokens of the global batch.

    Args:
        family: around the model, with the reducer attached.
        trainable: what AdamW gets.
        cfg: the run's settings.
        accumulation: micro batches a step.
    """

    def __init__(self, family: Family, trainable: Trainable, cfg: DictConfig, *, accumulation: int) -> None:
        self.family, self.trainable, self.accumulation = family, trainable, accumulation
        optimizer = torch.optim.AdamW(
            trainable.parameters.values(), lr=cfg.optim.lr, betas=tuple(cfg.optim.betas), weight_decay=cfg.optim.weight_decay
        )
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=TokenLoss(family), optimizer=optimizer, config=deepspeed_config(cfg, accumulation=accumulation)
        )
        self.rank, self.world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self.device = torch.device(self.deepspeed.device)
        self.stage = self.deepspeed.zero_optimization_stage()

    def whole_model(self) -> AbstractContextManager[None]:
        """For calls of parts of the model: gathers, under ZeRO 3, what no part's hook would (LLaVA-NeXT's image_newline)."""
        loose = list(self.family.model.model.parameters(recurse=False))
        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(loose, enabled=self.stage == 3)
        return gathered

    def step(self, micro_batches: list[MicroBatch], *, lr: float, num_labels: int) -> tuple[float, float]:
        """One AdamW step: (loss, gradient norm before clipping).

        Args:
            micro_batches: this rank's `accumulation` parts of the global batch.
            lr: learning rate of this step.
            num_labels: label tokens of the whole global batch, on all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed divides by the accumulation and averages over ranks; this turns both into one global token mean.
        scale = self.accumulation * self.world_size / max(num_labels, 1)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in micro_batches:
            with self.whole_model():
                loss = self.deepspeed(to_device(part, self.device))
            total += loss.detach()
            self.deepspeed.backward(loss * scale)
            norm = self._unsharded_norm()
            self.deepspeed.step()
        deepspeed.comm.all_reduce(total)
        return total.item() / max(num_labels, 1), norm if norm is not None else float(self.deepspeed.get_global_grad_norm())

    def _unsharded_norm(self) -> float | None:
        """The gradient norm where gradients are whole (ZeRO 0); ZeRO 2 and 3 report theirs after the step."""
        if self.stage > 0:
            return None
        gradients = [p.grad for p in self.trainable.parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def save(self, folder: str, tag: str, state: dict[str, Any]) -> None:
        """Write the resumable state: tuned weights, optimizer, `state`. Called by all ranks."""
        self.deepspeed.save_checkpoint(folder, tag=tag, client_state=state, exclude_frozen_parameters=True)

    def load(self, folder: str) -> dict[str, Any]:
        """Read the newest state back. Raises UserError if it is of other ranks or another ZeRO stage."""
        try:
            _, state = self.deepspeed.load_checkpoint(folder, load_module_strict=False)
        except (OSError, RuntimeError, KeyError, AssertionError) as error:
            raise UserError(
                f"the state in {folder} can't be resumed ({error}); use as many ranks and the ZeRO stage that wrote it, "
                f"or start over with fresh=true"
            ) from error
        return dict(state)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(projector, adapter): whole copies on the CPU, named as in the model and as in peft. Called by all ranks.

        The projector is there whether it was tuned itself or carries LoRA: it need not be the base model's own.
        """
        family = self.family
        kept = {n: p for n, p in family.model.named_parameters() if n.startswith(family.projector_name) or "lora_" in n}
        with deepspeed.zero.GatheredParameters(list(kept.values()), enabled=self.stage == 3):
            copies = {name: value.detach().to("cpu", copy=True) for name, value in kept.items()}
        projector = {n.replace(".base_layer", ""): value for n, value in copies.items() if "lora_" not in n}
        return projector, {f"base_model.model.{n}": value for n, value in copies.items() if "lora_" in n}
