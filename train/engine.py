"""DeepSpeed around the loss: an engine of any ZeRO stage.

The frozen weights stay in bf16 and the tuned ones are float32 parameters, their own master weights. DeepSpeed is told of no
precision at all: its bf16 mode would cast them, and keeps master weights in some ZeRO stages but not in others.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.batches.collate import MicroBatch
from train.losses import FastLoss, ReferenceLoss
from train.trainable import Trainable
from vzip import UserError


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The batch with its tensors on the device; from pinned memory, while other work goes on."""
    return batch.each(lambda values: values.to(device, non_blocking=True))


def deepspeed_config(cfg: DictConfig) -> dict[str, Any]:
    """The group `deepspeed`, completed with what the other settings say."""
    settings = OmegaConf.to_container(cfg.deepspeed, resolve=True)
    assert isinstance(settings, dict)
    return {
        **{str(key): value for key, value in settings.items()},
        "train_micro_batch_size_per_gpu": 1,  # of no consequence: it is asked for, and micro batches differ
        "gradient_accumulation_steps": 1,  # the engine says itself which micro batch is a step's last
        "gradient_clipping": cfg.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


class Engine:
    """One optimizer step at a time, on the mean loss over the label tokens of the global batch.

    Args:
        loss: of a micro batch; around the model.
        trainable: what AdamW gets.
        cfg: the run's settings.
    """

    def __init__(self, loss: ReferenceLoss | FastLoss, trainable: Trainable, cfg: DictConfig) -> None:
        self.family, self.trainable = loss.family, trainable
        optimizer = torch.optim.AdamW(
            trainable.parameters.values(),
            lr=cfg.optim.lr,
            betas=tuple(cfg.optim.betas),
            weight_decay=cfg.optim.weight_decay,
        )
        settings = deepspeed_config(cfg)
        if (
            cfg.deepspeed.zero_optimization.stage == 3
        ):  # shared out one by one, before all of them would go to the device
            deepspeed.zero.Init(module=loss, config_dict_or_path=settings)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=loss, optimizer=optimizer, config=settings
        )
        self.rank, self.world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self.device = torch.device(self.deepspeed.device)
        self.stage = self.deepspeed.zero_optimization_stage()

    def gathered_parameters(self) -> AbstractContextManager[None]:
        """For calls of parts of the model: gathers, under ZeRO 3, what no part's hook would (LLaVA-NeXT's image_newline)."""
        loose = list(self.family.model.model.parameters(recurse=False))
        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
            loose, enabled=self.stage == 3
        )
        return gathered

    def step(
        self, micro_batches: Sequence[MicroBatch], *, lr: float, num_labels: int, num_grad_labels: int
    ) -> tuple[float, float]:
        """One AdamW step: (mean loss over the label tokens that teach, gradient norm before clipping).

        Args:
            micro_batches: this rank's parts of the global batch; the ranks have the same number of them.
            lr: learning rate of this step.
            num_labels: label tokens of the whole global batch, on all ranks.
            num_taught_labels: those of the rows that the tuned weights learn from.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale = self.world_size / max(
            num_labels, 1
        )  # DeepSpeed averages over ranks; this makes it a global token mean
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, part in enumerate(micro_batches, start=1):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(micro_batches))
            with self.gathered_parameters():
                loss, has_gradient = self.deepspeed(to_device(part, self.device))
            total += has_gradient
            self.deepspeed.backward(loss * scale)
        norm = self._unsharded_norm()
        self.deepspeed.step()
        deepspeed.comm.all_reduce(total)
        return total.item() / max(num_grad_labels, 1), norm if norm is not None else float(
            self.deepspeed.get_global_grad_norm()
        )

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
        kept = {
            n: p
            for n, p in family.model.named_parameters()
            if n.startswith(family.projector_name) or "lora_" in n
        }
        with deepspeed.zero.GatheredParameters(list(kept.values()), enabled=self.stage == 3):
            copies = {name: value.detach().to("cpu", copy=True) for name, value in kept.items()}
        projector = {n.replace(".base_layer", ""): value for n, value in copies.items() if "lora_" not in n}
        return projector, {f"base_model.model.{n}": value for n, value in copies.items() if "lora_" in n}
