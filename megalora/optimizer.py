"""AdamW on the adapters' masters, and the loss scale of float16."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megalora.choices import OPTIMIZERS
from megalora.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # of each parameter, its shape and dtype


class FusedAdamW:
    """torch.optim.AdamW(groups, fused=True) by its kernel, for parameters of one device and dtype.

    torch's own class imports torch's compiler when it is made: most of a second of every start.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        self.param_groups = [{"lr": lr, "betas": betas, "eps": eps, **group} for group in groups]
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, found_inf: torch.Tensor | None = None) -> None:
        """Make one update; found_inf: a float32 scalar on their device, nothing is updated where it is 1."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self._state(p) for p in parameters]
            average, square, steps = ([state[key] for state in states] for key in (*MOMENTS, "step"))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters, [p.grad for p in parameters], average, square, [], steps, lr=group["lr"],
                beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False, grad_scale=None, found_inf=found_inf,
            )  # fmt: skip
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))

    def _state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        if p not in self.state:
            zeros = {key: torch.zeros_like(p) for key in MOMENTS}
            self.state[p] = zeros | {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        return self.state[p]


class AdapterOptimizer:
    """AdamW over named parameters; a stage may have none.

    kind  "adamw": torch's fused one; "apex": NVIDIA apex's FusedAdam, an error where it cannot be imported
    loraplus_lr_ratio  the learning rate of lora_B, biases and magnitudes over that of lora_A (LoRA+, Hayou et al. 2024;
                       grouped as peft's create_loraplus_optimizer)
    Biases are not decayed (as HF's Trainer).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        kind: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        loraplus_lr_ratio: float = 1.0,
    ):
        assert kind in OPTIMIZERS, kind
        self._parameters = dict(parameters)
        self._steps = 0
        self._optimizer: Any = None
        build: Callable[..., Any] = _apex_adam() if kind == "apex" else FusedAdamW
        grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in parameters.items():
            quick = "lora_B" in name or p.dim() == 1
            place = 0.0 if name.endswith(".bias") else weight_decay, loraplus_lr_ratio if quick else 1.0
            grouped.setdefault(place, []).append(p)
        self._grouped = grouped
        self._ratios = [ratio for _, ratio in grouped]
        self._make = functools.partial(build, lr=0.0, betas=betas, eps=eps)
        self._parts: dict[nn.Parameter, tuple[nn.Parameter, int]] = {}  # which updated tensor holds it, from where on

    def _build(self) -> None:
        """Make torch's optimizer, once the parameters have gradients: neighbours in memory are updated as one tensor.

        A model of experts has tens of thousands of small factors, whose update would take longer than their layers'.
        """
        if self._optimizer is not None or not self._parameters:
            return
        groups = []
        for (decay, _), parameters in self._grouped.items():
            runs = _runs(parameters)
            updated = [run[0] if len(run) == 1 else _joined(run) for run in runs]
            groups.append({"params": updated, "weight_decay": decay})
            for one, run in zip(updated, runs, strict=True):
                starts = itertools.accumulate((p.numel() for p in run), initial=0)
                self._parts |= {p: (one, start) for p, start in zip(run, starts, strict=False)}
        self._optimizer = self._make(groups)

    def _of(self, p: nn.Parameter, key: str) -> torch.Tensor:
        """Return the moment `key` of a parameter, as a view of that of the tensor that is updated."""
        whole, start = self._parts[p]
        return self._optimizer.state[whole][key].view(-1)[start : start + p.numel()].view(p.shape)

    def step(self, learning_rate: float, skip: torch.Tensor | None = None) -> None:
        """Make one update with the gradients that the parameters hold.

        skip  a bool scalar on their device: nothing is updated where it is true. The host need not know it yet, and
              says so later (`skipped`)
        """
        self._steps += 1
        self._build()
        if self._optimizer is None:
            return
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = learning_rate * ratio
        if isinstance(self._optimizer, FusedAdamW):
            self._optimizer.step(None if skip is None else skip.float())
        elif skip is None or not skip.item():
            self._optimizer.step()

    def skipped(self) -> None:
        """Note that the last step was one to skip."""
        self._steps -= 1

    @property
    def steps(self) -> int:
        """Updates made so far, those before a resume included."""
        return self._steps

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the two moments of each parameter, by name; {} before the first step."""
        if self._optimizer is None or not self._steps:
            return {}
        return {name: {key: self._of(p, key) for key in MOMENTS} for name, p in self._parameters.items()}

    def load_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], steps: int) -> None:
        """Go on from moments as `state` gives them, after `steps` updates."""
        self._steps = steps
        if not steps:
            return
        self._build()
        if self._optimizer is None:
            return
        for whole in dict.fromkeys(one for one, _ in self._parts.values()):
            moments = {key: torch.empty_like(whole) for key in MOMENTS}
            if isinstance(self._optimizer, FusedAdamW | torch.optim.AdamW):
                moments["step"] = torch.tensor(float(steps), dtype=torch.float32, device=whole.device)
            self._optimizer.state[whole] = moments
        for name, p in self._parameters.items():
            for key in MOMENTS:
                self._of(p, key).copy_(state[name][key])
        for group in self._optimizer.param_groups:
            if "step" in group or not isinstance(self._optimizer, FusedAdamW | torch.optim.AdamW):
                group["step"] = steps  # apex counts in the group


def _runs(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return `parameters` in lists of such as follow each other in memory, their gradients too."""
    runs: list[list[nn.Parameter]] = []
    for p in parameters:
        if runs and _follows(runs[-1][-1], p) and _follows(runs[-1][-1].grad, p.grad):
            runs[-1].append(p)
        else:
            runs.append([p])
    return runs


def _follows(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    return (
        first is not None
        and second is not None
        and first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.data_ptr() + first.nbytes == second.data_ptr()
    )


def _joined(run: Sequence[nn.Parameter]) -> nn.Parameter:
    """Return neighbours in memory as one parameter [n], which shares it, gradients too."""
    shape = (sum(p.numel() for p in run),)
    whole = nn.Parameter(run[0].detach().as_strided(shape, (1,)))
    whole.grad = run[0].grad.as_strided(shape, (1,))
    return whole


def _apex_adam() -> type[torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam  # the unrelated PyPI package of this name has no such module
    except ImportError:
        raise UserError(
            "optimizer = apex: NVIDIA's apex cannot be imported (the PyPI package of that name is another)",
            "build it from NVIDIA's repository, or use --optimizer adamw",
        ) from None
    return FusedAdam


class LossScale:
    """What float16 losses are multiplied by, so that small gradients do not vanish; 1 in other dtypes.

    As torch.amp.GradScaler: halved when a gradient overflows, doubled after `growth_interval` good steps. All ranks see
    the same gradient norm, so they agree without another message.
    """

    def __init__(self, enabled: bool, initial: float = 2.0**16, growth_interval: int = 2000):
        self.enabled = enabled
        self.value = initial if enabled else 1.0
        self.good_steps = 0
        self._growth_interval = growth_interval

    def state(self) -> dict[str, float | int | None]:
        """Return the plain values that `load_state` takes."""
        return {"loss_scale": self.value if self.enabled else None, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, where both runs are in float16: another dtype's has no scale."""
        value, good_steps = state["loss_scale"], int(state["good_steps"])
        if self.enabled and value is not None:
            self.value, self.good_steps = float(value), good_steps

    def update(self, overflowed: bool) -> bool:
        """Adapt to a step; return whether an overflow is only the scale looking for its place."""
        if not self.enabled:
            return False
        if overflowed:
            searching = self.value > 1.0
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            return searching
        self.good_steps += 1
        if self.good_steps >= self._growth_interval:
            self.value, self.good_steps = self.value * 2, 0
        return False
