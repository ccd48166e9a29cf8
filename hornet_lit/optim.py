"""Optimizer, learning-rate schedule and weight averaging as published (HorNet appendix A; the authors' TRAINING.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from timm.optim import Muon, create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

OptimizerName = Literal["adamw", "muon"]


def check_ranges(hparams: Mapping[str, Any]) -> None:
    """Refuse training settings that no training can have.

    Raises:
        ValueError: naming the setting, its value and its range.
    """
    at_least_0 = ("min_lr", "weight_decay", "warmup_epochs", "mixup", "cutmix", "ema_start_epoch", "skip_nonfinite")
    for name in ("lr", *at_least_0):
        least = "positive" if name == "lr" else "at least 0"
        if not 0 <= hparams[name] < math.inf or (name == "lr" and hparams[name] == 0):  # nan compares false
            raise ValueError(f"model.{name} is {hparams[name]}: it must be {least}, and finite")
    for name in ("drop_path_rate", "label_smoothing", "mix_prob", "mix_switch_prob"):
        if not 0 <= hparams[name] <= 1:
            raise ValueError(f"model.{name} is {hparams[name]}: it is a share and must lie between 0 and 1")
    if hparams["ema_decay"] is not None and not 0 <= hparams["ema_decay"] < 1:
        raise ValueError(f"model.ema_decay is {hparams['ema_decay']}: it must lie in [0, 1), or be null for no average")
    if hparams["layer_decay"] is not None and not 0 < hparams["layer_decay"] <= 1:
        raise ValueError(f"model.layer_decay is {hparams['layer_decay']}: it must lie in (0, 1], or be null for none")
    for name in ("num_classes", "in_chans", "img_size"):
        if hparams[name] is not None and hparams[name] < 1:
            raise ValueError(f"model.{name} is {hparams[name]}: it must be at least 1")


def build_optimizer(
    network: nn.Module,
    *,
    optimizer: OptimizerName = "adamw",
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """The optimizer, without weight decay on biases and 1-d parameters, optionally with layer decay.

    Args:
        optimizer: "adamw", as published; or "muon" (Jordan 2024, timm's): momentum made orthogonal for matrices and
            dense convolutions, scaled to AdamW's step size (arXiv 2502.16982), and AdamW for all else. On GPUs it is
            made so in bfloat16, so that runs on other numbers of them agree less closely than AdamW's.

    With ``layer_decay`` d, timm gives every group a factor d^(last - id) by the network's `group_matcher`, but only
    stores it as "lr_scale": `WarmupCosine` applies it at every step.

    ``fused`` must be False under a gradient scaler (16-mixed): a fused step unscales by itself, after clipping.

    Raises:
        ValueError: if no parameter requires a gradient, ``layer_decay`` lies outside (0, 1], or there is no such
            ``optimizer``.
    """
    if optimizer not in get_args(OptimizerName):
        raise ValueError(f"optimizer must be one of {', '.join(get_args(OptimizerName))}, got {optimizer!r}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}; null switches it off")
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError("no parameter requires a gradient: nothing to train")
    own = {"betas": betas, "eps": eps, "fused": fused} if optimizer == "adamw" else {"betas": betas}
    built = create_optimizer_v2(
        network, opt=optimizer, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **own
    )
    if isinstance(built, Muon):
        built.__class__ = _Muon
    built.register_load_state_dict_post_hook(_lay_out_like_parameters)
    return built


class _Muon(Muon):
    """timm's, with matrices on a CPU made orthogonal in float32 in place of bfloat16, which most CPUs multiply many
    times more slowly (BENCHMARKS.md, What single changes won)."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        with _orthogonal_in_float32_on_cpus():
            return super().step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # timm's is: else torch would call a step's hooks here as well


@contextmanager
def _orthogonal_in_float32_on_cpus() -> Iterator[None]:
    own = muon.zeropower_via_newtonschulz

    def by_device(matrix: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Asked here, so that it does no harm to another thread's optimizer on a GPU.
        return own(matrix, *args, **({"dtype": torch.float32} if matrix.device.type == "cpu" else {}) | kwargs)

    muon.zeropower_via_newtonschulz = by_device
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = own


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Copies moments that were saved in another memory format than the parameters have now (FSDP2's are contiguous, one
    device's channels-last): the fused AdamW walks both in memory order and paired the wrong elements (measured)."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            same = isinstance(value, torch.Tensor) and value.shape == p.shape and not isinstance(p, DTensor)
            if same and value.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


class WarmupCosine(CosineLRScheduler):
    """Linear from 0, reaching the peak ON the last warm-up step, then cosine to ``min_lr``, all per optimizer step.

    timm's own warm-up reaches the peak one step later than the published schedule does; the rest is timm's, which also
    applies each group's lr_scale.

    Args:
        optimizer: groups may hold "lr_scale".
        total_steps: optimizer steps of the whole training, warm-up included.
        warmup_steps: of these, the warm-up.
        min_lr: where the cosine ends.

    Raises:
        ValueError: if the warm-up is longer than the training.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int = 0, min_lr: float = 1e-6
    ) -> None:
        if warmup_steps > total_steps:
            raise ValueError(
                f"the warm-up takes {warmup_steps} steps but the training only {total_steps}: "
                "lower model.warmup_epochs or train longer"
            )
        super().__init__(
            optimizer,
            t_initial=max(total_steps - warmup_steps, 1),
            lr_min=min_lr,
            warmup_t=warmup_steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.warmup_steps = [value / max(warmup_steps - 1, 1) for value in self.base_values]
        self.step_update(0)


class Ema:
    """Exponential moving average of a network's parameters: ema = decay · ema + (1 - decay) · parameter.

    Starts as a copy of the network. Kept in float32 whatever the parameters' type, since (1 - decay) · w vanishes in
    bfloat16, and sharded like the parameters. Buffers are copied. Not a module: it stays out of `state_dict` and DDP.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay}; null switches averaging off")
        self.decay = decay
        self._averages = {name: _local(p).detach().clone().float() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take the parameters in; call once after each optimizer step."""
        parameters = [_local(p).detach().float() for _, p in network.named_parameters()]
        torch._foreach_lerp_(list(self._averages.values()), parameters, 1.0 - self.decay)

    @contextmanager
    def swapped(self, network: nn.Module) -> Iterator[None]:
        """Within the context the network computes with the averages; the raw parameters come back also on errors."""
        # Bound now: after an error in the middle of a sharded network some of its parameters are still gathered copies.
        parameters = [_local(p).detach() for _, p in network.named_parameters()]
        backup = [p.clone() for p in parameters]
        _write(parameters, self._averages.values())
        try:
            yield
        finally:
            _write(parameters, backup)
            for module in network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def state_dict(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """Full (gathered) averages on the CPU, under the network's state-dict names, its buffers included.

        With sharded parameters every process must call it.
        """
        averages = {name: _gathered(self._averages[name], p).cpu() for name, p in network.named_parameters()}
        return averages | {name: b.detach().cpu().clone() for name, b in _persistent_buffers(network)}

    def load_state_dict(self, network: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Take full averages in, sharding them like the parameters.

        Raises:
            ValueError: if a parameter has no average in ``state``.
        """
        missing = [name for name in self._averages if name not in state]
        if missing:
            raise ValueError(f"the checkpoint has no averaged weights for {', '.join(missing[:5])}")
        for name, p in network.named_parameters():
            full = state[name].to(device=p.device, dtype=torch.float32)
            local = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full
            self._averages[name].copy_(_local(local))


@torch.no_grad()
def _write(parameters: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return local
    layout: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, **layout).full_tensor()


def _persistent_buffers(network: nn.Module) -> list[tuple[str, torch.Tensor]]:
    kept = network.state_dict().keys()
    return [(name, b) for name, b in network.named_buffers() if name in kept]
