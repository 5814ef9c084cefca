"""The server, top to bottom: base and adapters, one stage that holds them all, requests until a signal.

    megalora serve --model_path DIR --adapters tuned=out --port 8000
    megalora serve --model_path DIR --adapters tuned=out --nproc 2 --tensor_parallel_size 2

HTTP and text are rank 0's, in a thread beside the replica; the other ranks see token ids.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalora.adapters.shared import Room, SharedAdapters, share
from megalora.asked import template_of
from megalora.building import build_stage, load_adapter, load_base_weights, resolve_base
from megalora.cluster.handlers import tell
from megalora.cluster.launch import choose_device, distributed
from megalora.cluster.watch import Watch
from megalora.compute_dtype import choose_dtype
from megalora.data.tokenizer import OpenedTokenizer, open_tokenizer
from megalora.errors import UserError
from megalora.flags import Serving
from megalora.generate import PATIENCE
from megalora.generation.defaults import not_applied, sampling_defaults
from megalora.generation.prompts import decode, stop_token_ids
from megalora.generation.replica import Replica
from megalora.generation.requests import Change
from megalora.generation.sampling import Sampling
from megalora.generation.steps import graph_obstacle
from megalora.generation.text import Reader
from megalora.models.config import check_layout, check_length, check_writes_text, read_config
from megalora.models.spec import ModelSpec
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.collectives import on_first, tell_once, together
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement
from megalora.rows import pixel_reader
from megalora.serving.adapters import AdapterReader, ReadAdapter, linears_of_experts, put_adapters, room_for
from megalora.serving.app import build_app
from megalora.serving.backlog import Backlog
from megalora.serving.images import KEPT_BYTES, ImageInput, pixels_of
from megalora.serving.loading import AdapterLoader
from megalora.serving.models import Catalogue, ServedModel
from megalora.serving.toolcalls import TAGS
from megalora.web.guard import allowed_hosts
from megalora.web.server import address_of, bind, served, token_for, with_token

LONGEST_CONTEXT = 4096  # of prompt and reply together, where no flag says more: the cache holds this for each slot
USUAL_RANK = 16  # that an adapter loaded later has room for, where no flag says more
SPARE_CONNECTIONS = 64  # beside those of requests: health, metrics, pages, and whoever is told that the line is full


def serve(arguments: Serving) -> None:
    """Run `arguments` on this process of the mesh. Raises UserError, on every rank, for what the user can fix."""
    device, remark = choose_device()
    layout, options = arguments.layout, arguments.server
    with distributed(
        device, layout.tensor_parallel_size, layout.pipeline_parallel_size, Watch(), PATIENCE
    ) as mesh, contextlib.ExitStack() as stack:  # fmt: skip
        with together(mesh.world):  # before the weights are loaded: a port that is taken is known at once
            listening = stack.enter_context(bind(options.host, options.port)) if mesh.world.is_first else None
            config = read_config(arguments.served.model_path)
            check_writes_text(config, arguments.served.model_path, "megalora generate labels texts; or name another")
            if config.encoder is not None:
                what = f"model_path {arguments.served.model_path}: {config.model_type} is an encoder-decoder"
                raise UserError(f"{what}, which serve does not answer with", "use megalora generate")
            check_layout(config, mesh.tp.size, mesh.pp.size, layout.uneven_heads)
            context = on_first(lambda: _context(config, options.seq_length), mesh.world)
        reader = _reader(arguments, config)
        read = on_first(lambda: _read(arguments, config, reader), mesh.world)
        with together(mesh.world):
            models = None if listening is None else _Models(arguments, config)
            catalogue = None if models is None else models.catalogue(read.templates, context)
        stage = _stage(arguments, config, read, mesh, device)
        put = None
        if read.room is not None:
            put_adapters(stage, read.room, read.changes, empty=True)
            put = functools.partial(_put, stage, read.room)
        fp8 = options.kv_cache == "fp8"
        replica = Replica(stage, mesh.pp, mesh.tp, context, Sampling(), (), listened_to=True, fp8_cache=fp8)
        with together(mesh.world):
            held = replica.reserve(options.max_running, context)
        if catalogue is None:
            with _on_signals(signal.SIG_IGN):  # rank 0 says when the end is
                replica.serve(None, None, mesh.world, put)
            return
        cached = f"keys and values of {options.max_running} requests of {context:,} tokens: {held / 2**30:.3g} GiB"
        known = (remark, not_applied(arguments.served.model_path), _without_graphs(stage, fp8))
        for note in (*filter(None, known), *read.notes, f"{cached} on each rank, {options.kv_cache}"):
            _say(note)
        backlog = Backlog(options.max_running, options.max_waiting)
        token = token_for(options.host, options.token)
        loader = AdapterLoader(read.room, reader, models.model, catalogue, backlog)
        app = build_app(catalogue, backlog, allowed_hosts(options.host), token, loader)
        with _serving(arguments, app, catalogue, backlog, listening, token):
            replica.serve(backlog, backlog, mesh.world, put)
    _say("stopped")


@dataclass(frozen=True)
class _Read:
    """What rank 0 has read of the adapters.

    shared     them as one; with `room` only how they lie side by side, and `changes` are what is in their places
    templates  the source of each adapter's own
    """

    shared: SharedAdapters | None
    room: Room | None
    changes: tuple[Change, ...]
    templates: Sequence[str | None]
    notes: tuple[str, ...]


def _reader(arguments: Serving, config: ModelSpec) -> AdapterReader:
    model = arguments.served
    weights = model.resume_from_checkpoint or model.model_path
    return AdapterReader(config, model.model_path, weights, resolve_base(model.base_format, config).name)


def _read(arguments: Serving, config: ModelSpec, reader: AdapterReader) -> _Read:
    """Read the adapters, checked against the base. For one rank."""
    model = arguments.served
    names = [name for name, _ in model.named_adapters]
    read = [reader.read(name, folder) for name, folder in model.named_adapters]
    notes = tuple(f"{name}: {note}" for name, one in zip(names, read, strict=True) for note in one.notes)
    templates = [one.template for one in read]
    if model.max_adapters is None:
        shared = share([(one.lora, one.tensors) for one in read]) if read else None
        return _Read(shared, None, (), templates, notes)
    largest = max((adapter.r for one in read for adapter in one.lora.adapters.values()), default=0)
    rank = model.max_adapter_rank or max(USUAL_RANK, largest)
    room = room_for(model.max_adapters, rank, config, _has_room_for_experts(model.room_for_experts, read, config))
    changes = tuple(Change(number, room.fit(one.lora, one.tensors)) for number, one in enumerate(read, 1))
    return _Read(room.empty(), room, changes, templates, notes)


def _has_room_for_experts(asked: bool | None, read: Sequence[ReadAdapter], config: ModelSpec) -> bool:
    """Return whether adapters of experts may come. Raises UserError where the model has no experts."""
    of_experts = linears_of_experts(config)
    if asked is not None and not of_experts:
        raise UserError(f"room_for_experts has no effect: {config.model_type} has no experts", "leave it out")
    return any(not of_experts.isdisjoint(one.lora.adapters) for one in read) if asked is None else asked


def _stage(arguments: Serving, config: ModelSpec, read: _Read, mesh: ParallelMesh, device: torch.device) -> Stage:
    """Build this rank's part of the model, with the base and all adapters in it. Collective."""
    layout, model, shared = arguments.layout, arguments.served, read.shared
    dtype = choose_dtype(model.dtype, device, mesh.world).dtype
    with together(mesh.world):
        base = resolve_base(model.base_format, config)
        place = Placement(mesh.tp, False, dtype, device, base=base)
        stage, _ = build_stage(
            config,
            mesh,
            NO_LORA if shared is None else shared.lora,
            place,
            partition_method=layout.partition_method,
            custom_partition=layout.custom_partition,
            uneven_heads=layout.uneven_heads,
        )
    with together(mesh.world):
        stage.read_pictures(pixels_of, KEPT_BYTES)
        notes = load_base_weights(stage, model.resume_from_checkpoint or model.model_path)
        if shared is not None:
            if read.room is None:
                load_adapter(stage, shared.tensors, "of the server")
            stage.share_adapters(shared.owners)
    tell_once(notes, mesh.world)
    return stage


def _without_graphs(stage: Stage, fp8: bool) -> str | None:
    """Return a line for the user of a GPU whose decoding steps are not CUDA graphs."""
    obstacle = None if torch.device(stage.place.device).type == "cpu" else graph_obstacle(stage, fp8)
    return None if obstacle is None else f"tokens are decoded without CUDA graphs: {obstacle}"


def _put(stage: Stage, room: Room, change: Change) -> None:
    put_adapters(stage, room, [change])


class _Models:
    """Makes the models by name. For rank 0."""

    def __init__(self, arguments: Serving, config: ModelSpec):
        self._served, self._options, self._config = arguments.served, arguments.server, config
        self._opened = open_tokenizer(arguments.served.model_path)
        reader = pixel_reader(config, arguments.served.model_path)
        self._images = None if reader is None else ImageInput(config.prefix, reader)

    def model(self, name: str, number: int, recorded: str | None) -> ServedModel:
        """Return the base (number 0) or an adapter. recorded: the source of its own template. Raises UserError."""
        template = template_of(self._options, self._config, self._opened, recorded)
        for note in template.notes if number == 0 else ():
            _say(note)
        stops = stop_token_ids(self._served.model_path, template)
        return ServedModel(name, number, template, stops, self._images)

    def catalogue(self, templates: Sequence[str | None], context: int) -> Catalogue:
        """Return the base and the adapters of the start. templates: the source of each adapter's own."""
        base = self._served.model_name or Path(self._served.model_path).resolve().name
        names = [base, *(name for name, _ in self._served.named_adapters)]
        if len(set(names)) < len(names):
            raise UserError(f"two models are named {base}", "give the base another name with --model_name")
        made = [self.model(*one) for one in zip(names, range(len(names)), [None, *templates], strict=True)]
        return Catalogue(
            {model.name: model for model in made},
            Reader(self._opened.tokenizer),
            Reader(self._opened.tokenizer, shown=TAGS),
            self._config.vocab_size,
            _without_text(self._opened),
            context,
            sampling_defaults(self._served.model_path),
            int(time.time()),
        )


def _without_text(opened: OpenedTokenizer) -> dict[str, int]:
    """Return the special tokens that leave no text in a reply, by themselves: as stop strings they are stopped at by
    id.
    """
    tokenizer = opened.tokenizer
    return {token: number for token, number in tokenizer.get_added_vocab().items() if not decode(tokenizer, [number])}


def _context(config: ModelSpec, given: int | None) -> int:
    """Return longest prompt and reply together, in tokens. Raises UserError as `check_length`."""
    if given is not None and (longer := check_length(config, given)) is not None:
        _say(longer)
    context, image = given or min(config.max_position_embeddings, LONGEST_CONTEXT), config.prefix
    if image is not None and context <= image.tokens + 1:
        what = f"seq_length ({context}) leaves no room for a text: an image takes {image.tokens} tokens"
        raise UserError(what, "raise seq_length")
    return context


# ---- running ----


@contextlib.contextmanager
def _serving(
    arguments: Serving, app: Any, catalogue: Catalogue, backlog: Backlog, listening: Any, token: str | None
) -> Iterator[None]:
    """Answer HTTP while inside; a signal closes the backlog, and ends what is there stop_timeout seconds later."""
    options = arguments.server
    connections = options.max_running + options.max_waiting + SPARE_CONNECTIONS
    with served(app, listening, connections), _on_signals(_Stop(backlog, options.stop_timeout)):
        address = address_of(listening, options.host)
        _say(f"serving {', '.join(catalogue.models)} at {address}/v1")
        if token is not None:
            _say("the API key is the --token that was given" if options.token else f"the API key is {token}")
        _say(f"chat page: {with_token(f'{address}/', token, options.token)}")
        try:
            yield
        finally:
            backlog.end_all(running=True)  # there are some where the replica has failed


class _Stop:
    """A signal handler: the first signal lets what is there end, for `seconds` at most; the second ends it at once."""

    def __init__(self, backlog: Backlog, seconds: float):
        self._backlog, self._seconds, self._asked = backlog, seconds, 0

    def __call__(self, number: int, frame: object) -> None:
        self._asked += 1
        if self._asked == 1:
            self._backlog.close(self._seconds)
            running, waiting = self._backlog.open
            tell(f"megalora: stopping: {running + waiting} requests are under way; a second signal ends them")
        elif self._asked == 2:
            self._backlog.abort()
        else:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _on_signals(handler: Any) -> Iterator[None]:
    """Send SIGINT and SIGTERM to `handler` while inside, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _say(text: str) -> None:
    print(f"megalora: {text}", file=sys.stderr, flush=True)
