"""Adapters that come and go while the server runs: read beside the replica, then taken by every rank between steps."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megalora.adapters.shared import Room
from megalora.errors import UserError
from megalora.generation.requests import Change
from megalora.serving.adapters import AdapterReader, ReadAdapter
from megalora.serving.backlog import Backlog
from megalora.serving.errors import ApiError, bad
from megalora.serving.models import Catalogue, ServedModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")
Make = Callable[[str, int, str | None], ServedModel]


class AdapterLoader:
    """All of it runs on the event loop, but for the reading.

    room  places of adapters on every rank; None: the adapters stay those of the start
    make  (name, number of the adapter, source of its own template or None) -> the model. Raises UserError
    """

    def __init__(self, room: Room | None, reader: AdapterReader, make: Make, catalogue: Catalogue, backlog: Backlog):
        self._room, self._reader, self._make = room, reader, make
        self._catalogue, self._backlog = catalogue, backlog
        self._under_way: dict[str, int] = {}  # the place of each adapter that is being loaded
        self._threads = ThreadPoolExecutor(1, "adapters")

    async def load(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Load the adapter lora_name from the folder lora_path, and return what to answer. Raises ApiError."""
        name, folder = _texts(body, "lora_name", "lora_path")
        if self._room is None:
            raise bad("no adapter can be loaded: start the server with --max_adapters, the number to have room for")
        if not NAME.fullmatch(name):
            raise bad(f"{name!r:.80} cannot be the name of a model: give letters, digits and . _ : / -", "lora_name")
        if name in self._catalogue.models or name in self._under_way:
            raise bad(f"there is a model {name} already: unload it first, or give another name", "lora_name")
        number = self._free_place(self._room)
        self._under_way[name] = number
        try:
            loop = asyncio.get_running_loop()
            read, model = await loop.run_in_executor(self._threads, self._read, name, folder, number)
            await self._backlog.make(Change(number, self._room.fit(read.lora, read.tensors)))
        except UserError as error:
            raise bad(str(error), "lora_path") from None
        finally:
            del self._under_way[name]
        self._catalogue.models[name] = model
        return {"id": name, "object": "model", "loaded": True, "notes": list(read.notes)}

    async def unload(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Take the adapter lora_name away; its requests that run or wait are replied to. Raises ApiError."""
        (name,) = _texts(body, "lora_name")
        model = self._catalogue.find(name)
        if self._room is None or model.adapter == 0:
            why = "the base model" if model.adapter == 0 else "an adapter of a server without --max_adapters"
            raise bad(f"{name} is {why}: it cannot be unloaded", "lora_name")
        del self._catalogue.models[name]
        return {"id": name, "object": "model", "deleted": True}

    def _read(self, name: str, folder: str, number: int) -> tuple[ReadAdapter, ServedModel]:
        if not Path(folder).is_dir():
            raise UserError(f"lora_path {folder:.200} is no folder of the machine that the server runs on", "name one")
        read = self._reader.read(name, folder)
        return read, self._make(name, number, read.template)

    def _free_place(self, room: Room) -> int:
        taken = {*self._under_way.values(), *(model.adapter for model in self._catalogue.models.values())}
        free = [number for number in range(1, room.adapters + 1) if number not in taken]
        if not free:
            raise bad(f"there is room for {room.adapters} adapters, all of it taken: unload one first", "lora_name")
        unused = next((number for number in free if not self._backlog.uses(number)), None)
        if unused is None:
            raise ApiError(429, "requests of the adapter that was unloaded still run: try again later")
        return unused


def _texts(body: Mapping[str, Any], *names: str) -> list[str]:
    """Return the fields of a body, which has no others."""
    for name in names:
        if not isinstance(body.get(name), str) or not body[name]:
            raise bad(f"{name} is missing, or is no text: give it", name)
    if others := sorted(body.keys() - set(names)):
        raise bad(f"{others[0][:80]} is not a field that this server knows: leave it out", others[0][:80])
    return [body[name] for name in names]
