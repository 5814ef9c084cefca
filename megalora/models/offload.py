"""Activations that wait in host memory: copied out beside the forward pass, and back before backward reads them.

Copies run on streams of their own. A tensor that leaves is held until its copy is done, at most IN_FLIGHT of them at a
time; one that comes back is fetched one layer ahead. Host memory is registered with CUDA once (pinned, in exactly the
size that is needed) and used again in every step. On a CPU, where host memory is all there is, copies are plain.
"""

from __future__ import annotations

from collections import deque

import torch

from megalora.errors import UserError

IN_FLIGHT = 2
_SMALL = 64 << 20  # bytes below which buffers may share pages with others, which cannot be registered twice


class HostMemory:
    """The buffers of one stage. nbytes  in use or waiting to be used again"""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.nbytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._registered: list[torch.Tensor] = []

    @property
    def streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """(of copies out, of copies in)."""
        if self._streams is None:
            self._streams = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        return self._streams

    def put(self, tensor: torch.Tensor) -> Offloaded:
        """Start to copy a tensor out. It must not be written to any more."""
        buffer = self._buffer(tensor.numel() * tensor.itemsize)
        place = buffer.view(tensor.dtype).view(tensor.shape)
        if self.device.type != "cuda":
            place.copy_(tensor)
            return Offloaded(self, buffer, tensor.dtype, tensor.shape)
        self.wait(IN_FLIGHT - 1)
        out, event = self.streams[0], torch.cuda.Event()
        out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(out):
            place.copy_(tensor, non_blocking=True)
            event.record()
        self._leaving.append((event, tensor))
        return Offloaded(self, buffer, tensor.dtype, tensor.shape)

    def wait(self, most: int = 0) -> None:
        """Let go of tensors whose copies were begun first, until `most` are left: the device waits, not the host."""
        while len(self._leaving) > most:
            torch.cuda.current_stream().wait_event(self._leaving.popleft()[0])

    def give_back(self, buffer: torch.Tensor) -> None:
        """Give back a buffer that may be written to again by what the current stream does from here on."""
        self._free.setdefault(buffer.numel(), []).append(buffer)

    def close(self) -> None:
        """Unregister all buffers. Nothing may be out."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for buffer in self._registered:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
        self._free, self._registered, self.nbytes = {}, [], 0
        self._leaving.clear()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        free = self._free.get(nbytes)
        if free:
            return free.pop()
        try:
            small = self.device.type == "cuda" and nbytes < _SMALL
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=small)
            if self.device.type == "cuda" and not small:
                buffer.zero_()  # gets its pages by all threads: registering them one by one is slow
                # torch's own pinned memory comes in powers of two.
                status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0)
                if int(status):
                    raise RuntimeError(f"cudaHostRegister gave {int(status)}")
                self._registered.append(buffer)
        except RuntimeError as error:
            raise UserError(
                f"offload_activations: no {nbytes / 2**20:,.0f} MiB more of pinned host memory beside the "
                f"{self.nbytes / 2**30:.1f} GiB that are used ({str(error).splitlines()[0]})",
                "give the run more host memory, --offload_activations false, or a shorter --seq_length",
            ) from None
        self.nbytes += nbytes
        return buffer


class Offloaded:
    """A tensor in host memory."""

    def __init__(self, host: HostMemory, buffer: torch.Tensor, dtype: torch.dtype, shape: torch.Size):
        self._host, self._buffer, self._dtype, self._shape = host, buffer, dtype, shape
        self._coming: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def prefetch(self) -> None:
        """Start to copy it back."""
        if self._coming is not None or self._host.device.type != "cuda":
            return
        self._host.wait()
        # The memory is the current stream's: what it held before was used there.
        place = torch.empty(self._shape, dtype=self._dtype, device=self._host.device)
        out, back = self._host.streams
        event = torch.cuda.Event()
        back.wait_stream(torch.cuda.current_stream())
        back.wait_stream(out)
        with torch.cuda.stream(back):
            place.copy_(self._buffer.view(self._dtype).view(self._shape), non_blocking=True)
            event.record()
        self._coming = place, event

    def take(self) -> torch.Tensor:
        """Return the tensor on the device, for once: its buffer is given back."""
        if self._host.device.type != "cuda":
            tensor = self._buffer.view(self._dtype).view(self._shape).clone()
        else:
            self.prefetch()
            tensor, event = self._coming
            torch.cuda.current_stream().wait_event(event)
        self._host.give_back(self._buffer)
        self._buffer = self._coming = None
        return tensor


class Resident:
    """A tensor that stays on the device, where an Offloaded may stand."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def prefetch(self) -> None:
        pass

    def take(self) -> torch.Tensor:
        """Return the tensor, for once."""
        tensor, self._tensor = self._tensor, None
        return tensor


Place = Offloaded | Resident


class Saved:
    """What one recomputed part keeps.

    host      where parts of the stage keep what is not to stay on the device, and this one too with `offloads`
    before    the part of the same microbatch whose backward comes next
    """

    def __init__(self, host: HostMemory | None = None, before: Saved | None = None, offloads: bool = False):
        self._host, self._before, self._offloads = host, before, offloads
        self._places: list[Place] = []

    def put(self, tensor: torch.Tensor) -> Place:
        """Keep a tensor, in host memory where the part's is to be there."""
        offloads = self._host is not None and self._offloads
        place: Place = self._host.put(tensor.detach()) if offloads else Resident(tensor.detach())
        self._places.append(place)
        return place

    def begin(self) -> None:
        """Call at the start of the part's backward: what it keeps is on its way already, the next part's starts."""
        if self._host is not None:  # the last that left in forward would be held until something is fetched
            self._host.wait()
        for saved in (self, self._before):
            for place in saved._places if saved is not None else ():
                place.prefetch()
        self._places, self._before = [], None
