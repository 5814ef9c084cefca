"""The Hugging Face hub as the place that an adapter is put: it needs huggingface_hub, a network and a login."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from megalora.errors import UserError

_HINT = "log in with hf auth login where there is a network, or leave push_to_hub out"


def check_hub(repository: str) -> None:
    """Raise UserError where nothing could be put into `repository`, before hours are spent on it."""
    try:
        _client().whoami()
    except Exception as error:  # of the hub's client, of the libraries below it
        raise UserError(f"push_to_hub {repository}: the hub does not let you in ({_line(error)})", _HINT) from None


def push(folder: Path, repository: str) -> str:
    """Put the files of a folder into a repository, which is made, private, where it is missing; return its address.

    Raises UserError that names the command which does it later.
    """
    try:
        client = _client()
        client.create_repo(repository, private=True, exist_ok=True)
        client.upload_folder(folder_path=str(folder), repo_id=repository, commit_message="Adapter trained by megalora")
    except Exception as error:
        raise UserError(
            f"push_to_hub {repository}: {folder} is whole, but could not be put there ({_line(error)})",
            f"put it there later: hf upload {repository} {folder}",
        ) from None
    return f"{client.endpoint}/{repository}"  # HF_ENDPOINT may name another hub


def _client() -> Any:
    return importlib.import_module("huggingface_hub").HfApi()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
