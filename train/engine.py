"""DeepSpeed around the loss: forward, backward and optimizer step, in any ZeRO stage.

The frozen weights stay in bf16. The trainable parameters are in float32 and serve as their own
master weights. DeepSpeed is not told about bf16: its bf16 mode would cast the trainable parameters,
and keep master weights in some ZeRO stages only.
"""

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


def deepspeed_config(cfg: DictConfig) -> dict[str, Any]:
    """Complete the config group `deepspeed` from the other settings."""
    settings = OmegaConf.to_container(cfg.deepspeed, resolve=True)
    assert isinstance(settings, dict)
    return {
        **{str(key): value for key, value in settings.items()},
        # DeepSpeed requires the size of a micro batch, but uses it only for statistics. Ours vary.
        "train_micro_batch_size_per_gpu": 1,
        # The number of micro batches differs from step to step, so `backward` marks the last one of
        # a step.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        # The progress bar shows the steps.
        "steps_per_print": None,
    }


class Engine:
    """The model on this rank's device, with AdamW on its trainable parameters.

    Args:
        loss: computes the loss of a micro batch. It is a module that holds the model.
        trainable: the parameters for AdamW.
        cfg: the run's settings.

    Attributes:
        family: the adapter around the model.
        rank: number of this process.
        world_size: number of processes.
        device: where the model runs.
        is_sharded: whether the ranks share the weights between them (ZeRO 3), so that all of them
            must run the same modules.
    """

    def __init__(self, loss: ReferenceLoss | FastLoss, trainable: Trainable, cfg: DictConfig) -> None:
        self.family = loss.family
        self.trainable = trainable

        # The frozen parameters are not among the optimizer's: they have no gradient.
        optimizer = torch.optim.AdamW(
            trainable.parameters.values(),
            lr=cfg.optim.lr,
            betas=tuple(cfg.optim.betas),
            weight_decay=cfg.optim.weight_decay,
        )
        settings = deepspeed_config(cfg)

        # Under ZeRO 3, share out the weights one tensor at a time: `initialize` alone would first
        # copy the whole model to the device.
        if cfg.deepspeed.zero_optimization.stage == 3:
            deepspeed.zero.Init(module=loss, config_dict_or_path=settings)

        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=loss, optimizer=optimizer, config=settings
        )

        # DeepSpeed decides the device, and knows the stage that is really in use.
        self.rank = deepspeed.comm.get_rank()
        self.world_size = deepspeed.comm.get_world_size()
        self.device = torch.device(self.deepspeed.device)
        self.is_sharded = self.deepspeed.zero_optimization_stage() == 3

        # The model is on its device now, so the shared prefix can be run.
        if isinstance(loss, FastLoss):
            loss.run_prefix(self.device)

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return self.trainable.num_parameters

    def forward(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Compute the loss of a micro batch.

        Returns:
            (loss to call `backward` on, loss to report): cross entropy, summed over all label
            tokens, and summed over the label tokens that the trainable parameters learn from
        """
        # Parts of the model are called outside of their modules here, so gather those parameters.
        with self.gathered_parameters():
            loss, reported = self.deepspeed(micro_batch.to(self.device))
        return loss, reported

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of a micro batch. After the last one, average over the ranks."""
        # DeepSpeed averages over the ranks at a boundary, so only the last micro batch is one.
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss)

    def optimizer_step(self, lr: float) -> float:
        """Clip the gradients, take an AdamW step and clear the gradients.

        Returns:
            the 2-norm of all gradients before clipping
        """
        # The loop computes the schedule, so DeepSpeed gets the rate of each step.
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        # Without ZeRO every rank holds whole gradients, and the step clears them: take their norm
        # before it. With ZeRO a rank may hold a part of them, and DeepSpeed knows the norm after
        # the step.
        if self.deepspeed.zero_optimization_stage() == 0:
            norm = self._gradient_norm()
            self.deepspeed.step()
        else:
            self.deepspeed.step()
            norm = float(self.deepspeed.get_global_grad_norm())
        return norm

    def _gradient_norm(self) -> float:
        """Compute the 2-norm of all gradients, before DeepSpeed clips them."""
        gradients = [p.grad for p in self.trainable.parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def sum_over_ranks(self, value: Tensor) -> float:
        """Add up a scalar over all ranks, in place. Called by all ranks."""
        deepspeed.comm.all_reduce(value)
        return float(value.item())

    def gathered_parameters(self) -> AbstractContextManager[None]:
        """Gather the parameters outside of submodules under ZeRO 3 (LLaVA-NeXT's image_newline).

        DeepSpeed gathers the parameters of a submodule when it runs, but not these. Use this around
        calls of parts of the model. Without ZeRO 3 it does nothing.
        """
        loose = list(self.family.model.model.parameters(recurse=False))
        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
            loose, enabled=self.is_sharded
        )
        return gathered

    def save(self, folder: str, tag: str, state: dict[str, Any]) -> None:
        """Write trainable parameters, optimizer and `state`. Called by all ranks."""
        # Frozen weights are many gigabytes, and the base model has them already.
        self.deepspeed.save_checkpoint(folder, tag=tag, client_state=state, exclude_frozen_parameters=True)

    def load(self, folder: str) -> dict[str, Any]:
        """Read the newest state back. Called by all ranks.

        Raises:
            UserError: the state was written by another number of ranks or in another ZeRO stage.
        """
        # A state holds no frozen weights, so their names are missing in it.
        try:
            _, state = self.deepspeed.load_checkpoint(folder, load_module_strict=False)
        except (OSError, RuntimeError, KeyError, AssertionError) as error:
            raise UserError(
                f"the state in {folder} can't be resumed ({error}); use the number of ranks and the "
                f"ZeRO stage that wrote it, or start over with fresh=true"
            ) from error
        return dict(state)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy the tuned weights to the CPU. Called by all ranks.

        Returns:
            (projector, adapter): whole tensors, named as in the model and as in peft. The projector
            is included even if only LoRA was tuned: it may differ from the base model's.
        """
        family = self.family

        # LoRA may be inside the projector, so modules don't separate the two: names do.
        tuned = {}
        for name, parameter in family.model.named_parameters():
            if name.startswith(family.projector_name) or "lora_" in name:
                tuned[name] = parameter

        # Under ZeRO 3 a rank holds a part of each tensor: gather all parts, then copy.
        with deepspeed.zero.GatheredParameters(list(tuned.values()), enabled=self.is_sharded):
            copies = {name: value.detach().to("cpu", copy=True) for name, value in tuned.items()}

        # Rename both to what their readers expect: `transformers` for the projector, peft for LoRA.
        projector = {}
        adapter = {}
        for name, value in copies.items():
            if "lora_" in name:
                adapter[f"base_model.model.{name}"] = value
            else:
                # peft has put ".base_layer" into the names of the layers that it wraps.
                projector[name.replace(".base_layer", "")] = value
        return projector, adapter
