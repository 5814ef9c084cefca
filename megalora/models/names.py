"""Parameters under the dotted names of the Hugging Face file, whatever object computes with them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megalora.parallel.split import Split


class Stem(nn.Module):
    """A part of a name; splits: how the parameters that stand directly below it are cut, by their last name."""

    def __init__(self) -> None:
        super().__init__()
        self.splits: dict[str, Split] = {}

    def shard_dims(self) -> dict[str, Split]:
        return self.splits


def hang(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register `module` below `root` under the dotted `name`, with stems in between where there are none."""
    *path, last = name.split(".")
    root = below(root, path)
    assert last not in root._modules, name
    root.add_module(last, module)


def below(root: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the module below `root` with the name of these parts, with stems where there are none."""
    for part in path:
        if part not in root._modules:
            root.add_module(part, Stem())
        root = root._modules[part]
    return root
