"""
One step of training: what moves the weights, and by how much.

    images, targets -> forward -> loss -> gradients -> unscale, clip -> AdamW or Muon -> average
                       (several processes: their mean)       the learning rate follows OneCycleLR

State holds all that a step changes.

Axes:  B batch   C channels   H, W image height and width   K classes
"""

import copy
import math
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from machine import pick_dtype, together
from muon import Muon
from recipe import TrainConfig
from vit import VisionTransformer, ViTConfig


@dataclass
class State:
    """What train_step works on."""

    model: VisionTransformer
    compiled: bool  # whether its blocks are
    ema: VisionTransformer | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # does nothing unless the dtype is float16
    dtype: torch.dtype

    def state_dict(self) -> dict:
        """Everything the next step depends on, as plain data that loads with weights_only=True."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict):
        """The inverse. The model comes first: it alone checks shapes."""
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:  # empty unless the dtype was float16; a run may move to another GPU
            self.scaler.load_state_dict(state["scaler"])


def parameter_groups(model: VisionTransformer, weight_decay: float) -> list[dict]:
    """Decay pulls matrices towards zero. The rest is free: biases, norms, class token, positions.

    The blocks' matrices come in groups of equal shape, which is how Muon wants them.
    """
    groups, rest = {}, []
    for name, parameter in model.named_parameters():
        is_embedding = name in ("cls_token", "pos_embed") or name.endswith("bias_table")
        if parameter.ndim < 2 or is_embedding:
            rest.append(parameter)
        else:  # blocks.3.attn.qkv.weight joins the other blocks' attn.qkv.weight
            kind = re.sub(r"^blocks\.\d+\.", "blocks.", name)
            groups.setdefault(kind, []).append(parameter)
    decayed = [
        {"params": same, "weight_decay": weight_decay, "muon": kind.startswith("blocks.")}
        for kind, same in groups.items()
    ]
    return [*decayed, {"params": rest, "weight_decay": 0.0, "muon": False}]


def build_state(
    config: TrainConfig,
    vit_config: ViTConfig,
    steps: int,
    device: torch.device,
    compiled: bool = False,
) -> State:
    """A fresh model with its optimizer and schedule, for a run of so many optimizer steps."""
    torch.manual_seed(config.seed)
    model = VisionTransformer(vit_config).to(device)
    optimizer = {"adamw": torch.optim.AdamW, "muon": Muon}[config.optimizer](
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.999), fused=True
    )
    # A rise of exactly one step would make OneCycleLR divide by zero; it means no rise.
    pct_start = 0.0 if config.pct_start * steps == 1 else config.pct_start
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.lr,
        total_steps=steps,
        pct_start=pct_start,
        cycle_momentum=False,  # True, the default, would overwrite AdamW's beta1
    )
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema_decay else None
    if compiled:
        # The blocks, not the model: they are alike, so the compiler works once and not depth times.
        # dynamic=False: else a second batch size would be compiled for any size, which is slower.
        # Own pictures can need nine sizes, counting validation's; torch's limit is eight.
        torch._dynamo.config.recompile_limit = 32
        for block in [*model.blocks, *(ema.blocks if ema else [])]:
            block.compile(dynamic=False)
    dtype = pick_dtype(config.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return State(model, compiled, ema, optimizer, scheduler, scaler, dtype)


def change_lr(state: State, factor: float):
    """Scale the whole schedule from here on: OneCycleLR keeps its corner points in the groups."""
    for group in state.optimizer.param_groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            group[key] *= factor


@torch.no_grad()
def update_ema(state: State, decay: float):
    """ema <- decay * ema + (1 - decay) * model; in the first steps less, to forget the start."""
    if state.ema is not None:
        step = state.scheduler.last_epoch  # optimizer steps before this one
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(state.ema.parameters()), list(state.model.parameters()), 1 - decay
        )


def average_gradients(model: VisionTransformer):
    """Replace the gradients by their mean over all processes, each of which has an equal share.

    DistributedDataParallel would do it while backward is still at work. But it changes the order of
    its sums after a process's first step (pytorch/pytorch#35137), and so a resumed run of three
    processes would not end in the same bits: (a + b) + c is not always a + (b + c).
    """
    if not (dist.is_available() and dist.is_initialized()):  # not in AMD's Windows builds
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message, not hundreds
    with together():
        dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients)])


def train_step(
    state: State, images: Tensor, targets: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """One optimizer step on images (B, C, H, W), soft targets (B, K): its loss and gradient norm.

    Both stay on the device: reading them here would make the CPU wait for the GPU in every step.
    """
    # the loss
    with torch.autocast(images.device.type, state.dtype, enabled=state.dtype != torch.float32):
        logits = state.model(images)
    loss = F.cross_entropy(logits.float(), targets)

    # the gradient, at its true size: float16 needs it scaled up on the way back
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    average_gradients(state.model)
    state.scaler.unscale_(state.optimizer)
    largest = config.grad_clip or math.inf  # inf: only measured
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), largest)

    # the step, unless float16 overflowed: asking is the one moment that waits for the GPU. (Not by
    # scaler.step(), which asks as well, but does not tell: average and schedule must know, too.)
    if not state.scaler.is_enabled() or norm.isfinite():
        state.optimizer.step()
        update_ema(state, config.ema_decay)
        state.scheduler.step()
    state.scaler.update()
    return loss.detach(), norm
