"""--return_logits: the logits of each prompt, a safetensors file a prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from megalora.errors import UserError
from megalora.files import write_file
from megalora.generation.requests import Prompt


class LogitsFolder:
    """Writes prompt_00000.safetensors and so on, numbered as the prompts: `logits` [tokens, vocab_size] float32, where
    logits[t] are those of the token after input_ids[t], and `input_ids` [tokens] int64. Of several models that reply to
    a prompt it keeps those of the first.

    Raises UserError where the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._saved: set[int] = set()  # numbers of prompts
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(error) from None

    def save(self, prompt: Prompt, logits: torch.Tensor) -> None:
        if prompt.number in self._saved:
            return
        self._saved.add(prompt.number)
        tensors = {"logits": logits.float().contiguous().cpu(), "input_ids": torch.tensor(prompt.token_ids)}
        try:
            write_file(self._folder / f"prompt_{prompt.number:05d}.safetensors", save(tensors))
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> UserError:
        return UserError(f"logits_dir {self._folder}: cannot be written ({error.strerror or error})", "name another")
