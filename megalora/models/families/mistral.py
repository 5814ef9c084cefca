"""Mistral: every layer slides its window where the config has one."""

from megalora.models.config import Family

FAMILY = Family("mistral", windows=lambda hf: (hf.sliding_window,) * hf.num_hidden_layers)
