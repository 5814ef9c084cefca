"""AdamW on the adapters' masters, and the loss scale of float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from megalora.choices import OPTIMIZERS
from megalora.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # of each parameter, its shape and dtype


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
        self._optimizer: torch.optim.Optimizer | None = None
        build: Callable[..., torch.optim.Optimizer] = _apex_adam() if kind == "apex" else torch.optim.AdamW
        if not parameters:
            return
        grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in parameters.items():
            quick = "lora_B" in name or p.dim() == 1
            place = 0.0 if name.endswith(".bias") else weight_decay, loraplus_lr_ratio if quick else 1.0
            grouped.setdefault(place, []).append(p)
        groups = [{"params": ps, "weight_decay": decay} for (decay, _), ps in grouped.items()]
        self._ratios = [ratio for _, ratio in grouped]
        options = {} if kind == "apex" else {"fused": True}
        self._optimizer = build(groups, lr=0.0, betas=betas, eps=eps, **options)

    def step(self, learning_rate: float, skip: torch.Tensor | None = None) -> None:
        """One update with the gradients that the parameters hold.

        skip  a bool scalar on their device: nothing is updated where it is true. The host need not know it yet, and
              says so later (`skipped`)
        """
        self._steps += 1
        if self._optimizer is None:
            return
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = learning_rate * ratio
        if isinstance(self._optimizer, torch.optim.AdamW):
            # As torch.amp.GradScaler hands it over: an attribute that AdamW does not declare.
            self._optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
            self._optimizer.step()
        elif skip is None or not skip.item():
            self._optimizer.step()

    def skipped(self) -> None:
        """The last step was one to skip."""
        self._steps -= 1

    @property
    def steps(self) -> int:
        """Updates made so far, those before a resume included."""
        return self._steps

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """The two moments of each parameter, by name; {} before the first step."""
        if self._optimizer is None or not self._steps:
            return {}
        return {
            name: {key: self._optimizer.state[p][key] for key in MOMENTS}
            for name, p in self._parameters.items()
        }

    def load_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], steps: int) -> None:
        """Goes on from moments as `state` gives them, after `steps` updates."""
        self._steps = steps
        if self._optimizer is None or not steps:
            return
        for name, p in self._parameters.items():
            moments = {key: state[name][key].to(p.device, p.dtype).clone() for key in MOMENTS}
            if isinstance(self._optimizer, torch.optim.AdamW):
                moments["step"] = torch.tensor(float(steps), dtype=torch.float32, device=p.device)
            self._optimizer.state[p] = moments
        for group in self._optimizer.param_groups:
            if "step" in group or not isinstance(self._optimizer, torch.optim.AdamW):
                group["step"] = steps  # apex counts in the group


def _apex_adam() -> type[torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam  # the unrelated PyPI package of this name has no such module
    except ImportError:
        raise UserError(
            "optimizer = apex: NVIDIA's apex cannot be imported (the PyPI package of that name is another): build it "
            "from NVIDIA's repository, or use --optimizer adamw"
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
        """The plain values that `load_state` takes."""
        return {"loss_scale": self.value if self.enabled else None, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, where both runs are in float16: another dtype's has no scale."""
        value, good_steps = state["loss_scale"], int(state["good_steps"])
        if self.enabled and value is not None:
            self.value, self.good_steps = float(value), good_steps

    def update(self, overflowed: bool) -> bool:
        """Adapts to a step; returns whether an overflow is only the scale looking for its place."""
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
