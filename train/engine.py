"""DeepSpeed around the loss: forward, backward and optimizer step, in any ZeRO stage.

The frozen weights stay in bf16. The trainable parameters are in float32 and serve as their own
master weights. DeepSpeed is not told about bf16: its bf16 mode would cast the trainable parameters,
and keep master weights in some ZeRO stages only.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from data.batches.collate import MicroBatch
from train.losses import FastLoss, ReferenceLoss
from train.trainable import Trainable


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


@dataclass(frozen=True)
class Fragment:
    """The part of a trainable parameter that one rank's AdamW steps.

    Attributes:
        owner: the tensor that AdamW steps. With ZeRO it is flat, and holds several parameters.
        offset: where the fragment begins in the owner.
        start: where it begins in the flattened parameter.
        length: its number of values.
    """

    owner: Tensor
    offset: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the fragment's place in the owner, or in a tensor of the owner's shape."""
        return tensor.view(-1).narrow(0, self.offset, self.length)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, also if the ranks share it out (ZeRO 3)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


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
        zero_stage: how much the ranks share out between them, from 0 (nothing) to 3 (all weights).
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
        self.zero_stage = int(self.deepspeed.zero_optimization_stage())
        self.is_sharded = self.zero_stage == 3

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

        Without ZeRO, gradients that are not finite leave the weights unchanged.

        Returns:
            the 2-norm of all gradients before clipping
        """
        # The loop computes the schedule, so DeepSpeed gets the rate of each step.
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        # Without ZeRO every rank holds whole gradients, and the step clears them: take their norm
        # before it. With ZeRO a rank may hold a part of them, and DeepSpeed knows the norm after
        # the step.
        if self.zero_stage == 0:
            norm = self._gradient_norm()
            if math.isfinite(norm):
                self.deepspeed.step()
        else:
            self.deepspeed.step()
            norm = float(self.deepspeed.get_global_grad_norm())
        return norm

    def _gradient_norm(self) -> float:
        """Compute the 2-norm of all gradients, before DeepSpeed clips them."""
        gradients = [p.grad for p in self.trainable.parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Add up each of several numbers over all ranks. Called by all ranks."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        deepspeed.comm.all_reduce(sums)
        return sums.tolist()

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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the trainable parameters, by name."""
        return {name: _shape(parameter) for name, parameter in self.trainable.parameters.items()}

    def gather(self, part: str) -> dict[str, Tensor]:
        """Gather a part of the resumable state on rank 0. Called by all ranks.

        Args:
            part: one of `train.state.PARTS`: the weights, or what AdamW keeps for them.

        Returns:
            whole tensors on the CPU, by the names of the parameters; nothing on the other ranks
        """
        tensors = {}
        for name, parameter in self.trainable.parameters.items():
            # One parameter at a time, so that the device holds no second copy of all of them.
            tensor = self._gather_steps(parameter) if part == "step" else self._gather_one(parameter, part)
            if self.rank == 0:
                tensors[name] = tensor.to("cpu", copy=True)
        return tensors

    def _gather_one(self, parameter: nn.Parameter, part: str) -> Tensor:
        """Put a parameter together from the fragments of all ranks, to the same bits."""
        shape = _shape(parameter)
        whole = torch.zeros(math.prod(shape), device=self.device)
        fragment = self._fragment(parameter)
        if fragment is not None:
            end = fragment.start + fragment.length
            whole[fragment.start : end] = fragment.of(self._tensor(fragment.owner, part))

        # Each value comes from one rank, and is zero on the others. Whole numbers add up to exactly
        # its bits, while adding 0.0 would lose the sign of a -0.0.
        if self.zero_stage > 0:
            deepspeed.comm.all_reduce(whole.view(torch.int32))
        return whole.view(shape)

    def _gather_steps(self, parameter: nn.Parameter) -> Tensor:
        """Return how many steps AdamW has taken for a parameter."""
        # A rank without a fragment of the parameter does not know.
        fragment = self._fragment(parameter)
        steps = torch.zeros((), device=self.device)
        if fragment is not None:
            steps += self._tensor(fragment.owner, "step").to(self.device)
        deepspeed.comm.all_reduce(steps, op=deepspeed.comm.ReduceOp.MAX)
        return steps

    def restore(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `gather` returned, on any number of ranks. Called by all ranks.

        Args:
            part: as in `gather`.
            tensors: what `gather` returned, on rank 0. The other ranks' argument is not used.
        """
        if self.is_sharded:
            # Small parameters are whole on all ranks. Until the epilogue, each has only its share.
            self.optimizer.checkpoint_event_prologue()

        for name, parameter in self.trainable.parameters.items():
            if self.rank == 0:
                value = tensors[name].to(self.device)
            else:
                value = torch.empty(() if part == "step" else _shape(parameter), device=self.device)
            deepspeed.comm.broadcast(value, src=0)
            self._restore_one(parameter, part, value)

        if self.is_sharded:
            self.optimizer.checkpoint_event_epilogue()

    def _restore_one(self, parameter: Any, part: str, value: Tensor) -> None:
        """Put a whole tensor into this rank's fragment of a parameter, and into the model."""
        fragment = self._fragment(parameter)
        if fragment is not None and part == "step":
            self._tensor(fragment.owner, part).copy_(value)
        elif fragment is not None:
            own = value.view(-1).narrow(0, fragment.start, fragment.length)
            fragment.of(self._tensor(fragment.owner, part)).copy_(own)
            # Under ZeRO 3 the model, too, holds this rank's fragment only.
            if part == "weights" and self.is_sharded:
                parameter.ds_tensor.data.narrow(0, 0, fragment.length).copy_(own)

        # With ZeRO 1 and 2, AdamW steps a copy of what is in the model.
        if part == "weights" and not self.is_sharded:
            parameter.data.copy_(value)

    def _fragment(self, parameter: Any) -> Fragment | None:
        """Find the part of a parameter that this rank's AdamW steps; None if it steps none of it."""
        if self.zero_stage == 0:
            return Fragment(parameter, offset=0, start=0, length=parameter.numel())

        # Each rank has an equal share of every parameter. The last share may be partly padding.
        if self.zero_stage == 3:
            group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start = min(self.rank * size, parameter.ds_numel)
            length = min(size, parameter.ds_numel - start)
            return Fragment(self.optimizer.fp32_partitioned_groups_flat[group], offset, start, length)

        # Each rank has an equal share of all parameters, one after the other.
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return Fragment(
            self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index],
            offset=mapping.hp_fragment_address.start,
            start=mapping.lp_fragment_address.start,
            length=mapping.lp_fragment_address.numel,
        )

    def _tensor(self, owner: Tensor, part: str) -> Tensor:
        """Return a tensor that AdamW steps, or one that it keeps for it."""
        if part == "weights":
            return owner.data

        # With ZeRO, DeepSpeed wraps AdamW. Before its first step, AdamW keeps nothing: begin with
        # the zeros that it would begin with.
        adamw = self.optimizer if self.zero_stage == 0 else self.optimizer.optimizer
        state = adamw.state[owner]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(owner.data)
            state["exp_avg_sq"] = torch.zeros_like(owner.data)
        tensor: Tensor = state[part]
        return tensor

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
            if name.startswith(family.projector_names) or "lora_" in name:
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
