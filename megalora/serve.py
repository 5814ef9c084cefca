"""The server, top to bottom: base and adapters, one stage that holds them all, requests until a signal.

    megalora serve --model_path DIR --adapters tuned=out --port 8000
    megalora serve --model_path DIR --adapters tuned=out --nproc 2 --tensor_parallel_size 2

HTTP and text are rank 0's, in a thread beside the replica; the other ranks see token ids.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.adapters.shared import SharedAdapters, share
from megalora.building import (
    build_stage,
    check_adapter,
    load_adapter,
    load_base_weights,
    resolve_base,
    resolve_dtype,
    resolve_lora,
)
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.choices import CLASSIFICATION
from megalora.cluster.launch import choose_device, distributed
from megalora.cluster.watch import Watch
from megalora.data import ChatTemplate
from megalora.data.template import TemplateOptions
from megalora.data.tokenizer import OpenedTokenizer, open_tokenizer
from megalora.errors import UserError
from megalora.flags import Serving
from megalora.generate import PATIENCE
from megalora.generation.defaults import sampling_defaults
from megalora.generation.prompts import decode, stop_token_ids
from megalora.generation.replica import Replica
from megalora.generation.sampling import Sampling
from megalora.generation.text import Reader
from megalora.identity import adapter_template, base_identity, check_base, other_base_format
from megalora.models.config import check_layout, check_length, check_writes_text, read_config
from megalora.models.spec import ModelSpec
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.collectives import on_first, together
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement
from megalora.serving.app import build_app
from megalora.serving.backlog import Backlog
from megalora.serving.models import Catalogue, ServedModel
from megalora.web.guard import allowed_hosts
from megalora.web.server import address_of, bind, served, token_for, with_token

LONGEST_CONTEXT = 4096  # of prompt and reply together, where no flag says more: the cache holds this for each slot
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
            check_layout(config, mesh.tp.size, mesh.pp.size, layout.uneven_heads)
            context = on_first(lambda: _context(config, options.seq_length), mesh.world)
        read = on_first(lambda: _read(arguments, config), mesh.world)
        with together(mesh.world):
            catalogue = None if listening is None else _catalogue(arguments, config, read, context)
        stage = _stage(arguments, config, read.shared, mesh, device)
        replica = Replica(stage, mesh.pp, mesh.tp, context, Sampling(), (), listened_to=True)
        replica.reserve(options.max_running, context)
        if catalogue is None:
            with _on_signals(signal.SIG_IGN):  # rank 0 says when the end is
                replica.serve(None, None, mesh.world)
            return
        backlog = Backlog(options.max_running, options.max_waiting)
        for note in (*([remark] if remark else []), *read.notes):
            _say(note)
        _run(arguments, catalogue, backlog, replica, listening, mesh)


@dataclass(frozen=True)
class _Read:
    """What rank 0 has read of the adapters. templates: the source of each adapter's own."""

    shared: SharedAdapters | None
    templates: Sequence[str | None]
    notes: tuple[str, ...]


def _read(arguments: Serving, config: ModelSpec) -> _Read:
    """Read the adapters, checked against the base. For one rank."""
    names = arguments.served.named_adapters
    tokenizer = open_tokenizer(arguments.served.model_path).tokenizer if names else None
    base_format = resolve_base(arguments.served.base_format, config).name
    identity, adapters, templates, notes = None, [], [], []
    for name, folder in names:
        adapter = open_adapter(folder)
        task = adapter.lora_config.get("task_type")
        if task in CLASSIFICATION:  # told first: the base with its head has another identity
            raise UserError(
                f"adapter {name} ({adapter.where}) is of task_type {task}, which writes no text",
                "name an adapter of task_type CAUSAL_LM",
            )
        if identity is None:
            weights = arguments.served.resume_from_checkpoint or arguments.served.model_path
            identity = base_identity(config, weights, tokenizer)
        check_base(adapter, identity)
        notes += [f"{name}: {note}" for note in (*adapter.notes, *other_base_format(adapter, base_format))]
        lora = _resolved(name, adapter, config)
        check_adapter(adapter.tensors, lora, config, adapter.where)
        _check_shared(name, adapter, config)
        adapters.append((lora, adapter.tensors))
        templates.append(adapter_template(adapter))
    return _Read(share(adapters) if adapters else None, templates, tuple(notes))


def _resolved(name: str, adapter: AdapterCheckpoint, config: ModelSpec) -> ResolvedLora:
    lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where, trained=True)
    for field in ("bias", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
        if (value := getattr(lora_config, field)) not in (None, False, "none", (), {}):
            raise _not_shared(name, adapter, f"{field} = {value!r}")
    try:
        return resolve_lora(lora_config, config)
    except UserError as error:
        raise UserError(
            f"adapter {adapter.where}: is of another model ({error.message})", "name an adapter of this model"
        ) from None


def _check_shared(name: str, adapter: AdapterCheckpoint, config: ModelSpec) -> None:
    """Raise UserError where an adapter has more than A and B of the layers' linears: the rest is one for all tokens."""
    for tensor in adapter.tensors:
        linear, factor = tensor.rsplit(".lora_", 1) if ".lora_" in tensor else (tensor, "")
        if linear not in config.linears or factor not in ("A.weight", "B.weight"):
            raise _not_shared(name, adapter, tensor)


def _not_shared(name: str, adapter: AdapterCheckpoint, what: str) -> UserError:
    return UserError(
        f"adapter {name} ({adapter.where}) has {what}, which requests of several adapters in one batch cannot share",
        "merge it (megalora convert adapter merge) and serve the merged model",
    )


def _stage(
    arguments: Serving, config: ModelSpec, shared: SharedAdapters | None, mesh: ParallelMesh, device: torch.device
) -> Stage:
    """Build this rank's part of the model, with the base and all adapters in it. Collective."""
    layout, model = arguments.layout, arguments.served
    with together(mesh.world):
        base = resolve_base(model.base_format, config)
        place = Placement(mesh.tp, False, resolve_dtype(model.dtype, device), device, base=base)
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
        load_base_weights(stage, model.resume_from_checkpoint or model.model_path)
        if shared is not None:
            load_adapter(stage, shared.tensors, "of the server")
            stage.share_adapters(shared.owners)
    return stage


def _catalogue(arguments: Serving, config: ModelSpec, read: _Read, context: int) -> Catalogue:
    """The models by name. For rank 0."""
    model, options = arguments.served, arguments.server
    opened = open_tokenizer(model.model_path)
    base = model.model_name or Path(model.model_path).resolve().name
    names = [base, *(name for name, _ in model.named_adapters)]
    if len(set(names)) < len(names):
        raise UserError(f"two models are named {base}", "give the base another name with --model_name")
    variables = TemplateOptions(options.template_variables, special_tokens_in_text=options.special_tokens_in_text)
    models = {}
    for number, (name, recorded) in enumerate(zip(names, [None, *read.templates], strict=True)):
        template = ChatTemplate.of(opened, options.template, variables, recorded)
        for note in template.notes if number == 0 else ():
            _say(note)
        models[name] = ServedModel(name, number, template, stop_token_ids(model.model_path, template))
    tokenizer = opened.tokenizer
    return Catalogue(
        models,
        Reader(tokenizer),
        config.vocab_size,
        _without_text(opened),
        context,
        sampling_defaults(model.model_path),
        int(time.time()),
    )


def _without_text(opened: OpenedTokenizer) -> dict[str, int]:
    """The special tokens that leave no text in a reply, by themselves: as stop strings they are stopped at by id."""
    tokenizer = opened.tokenizer
    return {token: number for token, number in tokenizer.get_added_vocab().items() if not decode(tokenizer, [number])}


def _context(config: ModelSpec, given: int | None) -> int:
    """Longest prompt and reply together, in tokens. Raises UserError as `check_length`."""
    if given is not None and (longer := check_length(config, given)) is not None:
        _say(longer)
    return given or min(config.max_position_embeddings, LONGEST_CONTEXT)


# ---- running ----


def _run(
    arguments: Serving,
    catalogue: Catalogue,
    backlog: Backlog,
    replica: Replica,
    listening: Any,
    mesh: ParallelMesh,
) -> None:
    """Serve until a signal; then reply to what is there, for stop_timeout seconds."""
    options = arguments.server
    token = token_for(options.host, options.token)
    hosts = allowed_hosts(options.host)
    connections = options.max_running + options.max_waiting + SPARE_CONNECTIONS
    stop = _Stop(backlog, options.stop_timeout)
    with served(build_app(catalogue, backlog, hosts, token), listening, connections), _on_signals(stop):
        address = address_of(listening, options.host)
        _say(f"serving {', '.join(catalogue.models)} at {address}/v1")
        if token is not None:
            _say("the API key is the --token that was given" if options.token else f"the API key is {token}")
        _say(f"chat page: {with_token(f'{address}/', token, options.token)}")
        try:
            replica.serve(backlog, backlog, mesh.world)
        finally:
            backlog.end_all(running=True)  # there are some where the replica has failed
            stop.cancel()
    _say("stopped")


class _Stop:
    """A signal handler: the first signal lets what is there end, for `seconds` at most; the second ends it at once."""

    def __init__(self, backlog: Backlog, seconds: float):
        self._backlog, self._seconds, self._asked = backlog, seconds, 0
        self._timer = threading.Timer(seconds, backlog.abort)
        self._timer.daemon = True

    def __call__(self, number: int, frame: object) -> None:
        self._asked += 1
        self._backlog.close()
        if self._asked == 1:
            running, waiting = self._backlog.open
            told = f"megalora: stopping: {running + waiting} requests are under way; a second signal ends them\n"
            os.write(sys.stderr.fileno(), told.encode())  # print() may be what this interrupts
            self._timer.start()
        elif self._asked == 2:
            self._backlog.abort()
        else:
            raise KeyboardInterrupt

    def cancel(self) -> None:
        self._timer.cancel()


@contextlib.contextmanager
def _on_signals(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` while inside, where this is the main thread."""
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
