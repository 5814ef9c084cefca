"""What a model is trained to do: one file an objective, found by the `task_type` of lora_config.json."""

from __future__ import annotations

from collections.abc import Mapping

from megalora.tasks.causal import CausalLM
from megalora.tasks.task import Task

TASKS: Mapping[str, Task] = {"CAUSAL_LM": CausalLM()}  # the names are choices.TASKS

__all__ = ["TASKS", "CausalLM", "Task"]
