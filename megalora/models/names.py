"""Parameters under the dotted names of the Hugging Face file, whatever object computes with them."""

from __future__ import annotations

from torch import nn


def hang(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register `module` below `root` under the dotted `name`, with plain modules in between where there are none."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    assert last not in root._modules, name
    root.add_module(last, module)
