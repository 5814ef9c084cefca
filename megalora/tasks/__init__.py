"""What a model is trained to do: one file an objective, found by the `task_type` of lora_config.json."""

from __future__ import annotations

from collections.abc import Mapping

from megalora.tasks.causal import CausalLM
from megalora.tasks.classes import Classification
from megalora.tasks.task import Task

TASKS: Mapping[str, Task] = {  # the names are choices.TASKS
    "CAUSAL_LM": CausalLM(),
    "SEQ_2_SEQ_LM": CausalLM(),  # each token of the target, from those before it and the source
    "TOKEN_CLS": Classification(tags=True),
    "SEQ_CLS": Classification(tags=False),
}

__all__ = ["TASKS", "CausalLM", "Classification", "Task"]
