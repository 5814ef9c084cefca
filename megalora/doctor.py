"""`megalora doctor`: what would stop or slow a run, found before it: one table of checks, of every host.

megalora doctor --output_dir out                          this machine
torchrun ... -m megalora doctor --tensor_parallel_size 2  every host, and the links of the mesh between them
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from megalora import __version__
from megalora.cluster.environment import environment_int
from megalora.cluster.launch import choose_device, distributed
from megalora.cluster.sockets import is_loopback, listening
from megalora.cluster.watch import host_name
from megalora.flags import DoctorArguments
from megalora.ops import extension
from megalora.ops.lora_linear import fits_gpu
from megalora.ops.swiglu import swiglu
from megalora.parallel.collectives import all_reduce, broadcast_object, gather_objects
from megalora.parallel.mesh import Axis, ParallelMesh

OK, WARNING, FAULT = "ok", "warning", "FAULT"
SKEW = 5.0  # seconds of difference between clocks that still do no harm
SLOW = 4.0  # a link this many times slower than the median of its kind is named
FLOOR = 100e6  # bytes/s between hosts below which a link is named anyway: gigabit Ethernet
LATE = 5e-3  # seconds of one way between hosts above which it is named
MESSAGE = {"cpu": 1 << 20, "cuda": 32 << 20}  # bytes of the bandwidth test; PINGS messages are that of latency
PINGS = 10
ROUNDS = 5  # of the bandwidth test


@dataclass(frozen=True)
class Finding:
    """One row of the table. A FAULT would stop a run or spoil its numbers."""

    check: str
    state: str
    text: str


def doctor(wanted: DoctorArguments) -> bool:
    """Print the table, on rank 0. Return whether no check is a FAULT. Collective under torchrun."""
    device, _ = choose_device()
    alone = environment_int("WORLD_SIZE", 1) == 1
    tp, pp = (1, 1) if alone else (wanted.tensor_parallel_size, wanted.pipeline_parallel_size)
    mine = this_host(wanted, device)
    network = [one for one in mine if one.check == "interface" and one.state == FAULT]
    if network and not alone:  # without it no process group comes up, so this host speaks for itself
        if environment_int("LOCAL_RANK", 0) == 0:
            show([(host_name(), one) for one in mine])
        return False
    with distributed(device, tp, pp) as mesh:
        if not alone:
            mine.append(_listening(len(set(gather_objects(host_name(), mesh.world)))))
        hosts = gather_objects((host_name(), mine if environment_int("LOCAL_RANK", 0) == 0 else []), mesh.world)
        rows = [(host, one) for host, findings in hosts for one in findings]
        if not alone:
            rows += [("all", one) for one in across_hosts(wanted, mesh)]
            rows += [("all", one) for one in links(mesh, [host for host, _ in hosts], device)]
        if mesh.world.is_first:
            show(rows)
        return all(one.state != FAULT for _, one in rows)


def show(rows: Sequence[tuple[str, Finding]]) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("host", "check", "state", "found"):
        table.add_column(name, no_wrap=name != "found", overflow="fold")
    for host, one in rows:
        style = {OK: None, WARNING: "yellow", FAULT: "bold red"}[one.state]
        table.add_row(host, one.check, one.state, one.text, style=style)
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
    counts = {state: sum(one.state == state for _, one in rows) for state in (FAULT, WARNING)}
    print(f"doctor: {counts[FAULT]} faults, {counts[WARNING]} warnings in {len(rows)} checks", flush=True)


# ---- one host


def this_host(wanted: DoctorArguments, device: torch.device) -> list[Finding]:
    """Return the checks that need no other host."""
    checks: list[Callable[[], list[Finding]]] = [
        _versions,
        lambda: [_extension(device)],
        _gpus,
        _interfaces,
        _infiniband,
        lambda: [disk(wanted.output_dir, wanted.free_space)],
    ]
    return [one for check in checks for one in check()]


def _listening(hosts: int) -> Finding:
    """Return on what this process and its launcher listen, now that the ranks have found one another."""
    sockets = listening([os.getpid(), os.getppid()])
    text = ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in sockets) or "nothing"
    if all(is_loopback(address) for address, _ in sockets):
        return Finding("listens", OK, f"{text}: other machines reach none of it")
    if hosts == 1:
        remedy = "start with megalora COMMAND --nproc N, which listens on the loopback alone, or keep others out"
        return Finding("listens", WARNING, f"{text}: whoever reaches these ports can disturb the run: {remedy}")
    return Finding("listens", OK, f"{text}: only the hosts of the run should reach these ports")


def _versions() -> list[Finding]:
    found = {"megalora": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found["transformers"] = importlib.metadata.version("transformers")
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return [Finding("versions", OK, ", ".join(f"{name} {version}" for name, version in found.items()))]


def _extension(device: torch.device) -> Finding:
    if not extension.has_kernels(device.type):
        remedy = "build it with `make install`, or pip install --no-build-isolation ."
        return Finding("extension", WARNING, f"no compiled ops for {device.type}: plain torch, slower; {remedy}")
    if device.type == "cuda":
        try:
            swiglu(torch.ones(8, 64, device=device))
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return Finding("extension", FAULT, f"does not run on {_gpu_name(device)}: {error}")
        if not fits_gpu(device.index):
            text = f"compiled ops for cuda, but those of LoRA ask for more shared memory than a {_gpu_name(device)} has"
            return Finding("extension", WARNING, f"{text}: plain torch stands in for them, slower")
    return Finding("extension", OK, f"compiled ops for {device.type}")


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPUs", OK, "none: runs on the CPU")]
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(count)}))
    found = [Finding("GPUs", OK, f"{count} x {names}")]
    apart = [
        f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if count > 1:
        text = f"no direct access between GPUs {', '.join(apart[:8])}" if apart else "every GPU reaches every other"
        found.append(Finding("GPU links", WARNING if apart else OK, text))
    return found


def _interfaces() -> list[Finding]:
    """Check that the interfaces chosen for NCCL and gloo exist and are up."""
    folder = Path("/sys/class/net")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        named = os.environ.get(variable, "")
        for name in filter(None, named.split(",")):
            if name[0] in "^=" or not there:  # NCCL's patterns are NCCL's to read
                continue
            if not any(one == name or (variable.startswith("NCCL") and one.startswith(name)) for one in there):
                text = f"{variable}={name}: this host has no such interface, only {', '.join(there)}: name one of these"
                found.append(Finding("interface", FAULT, text))
            elif (folder / name / "operstate").exists() and _read(folder / name / "operstate") == "down":
                found.append(Finding("interface", FAULT, f"{variable}={name}: the interface is down"))
    chosen = os.environ.get("GLOO_SOCKET_IFNAME") or "left to the libraries"
    return found or [Finding("interface", OK, f"{chosen}, of {', '.join(there)}")]


def _infiniband() -> list[Finding]:
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    found = []
    for port in ports:
        state, rate = _read(port / "state"), _read(port / "rate")
        text = f"{port.parts[-3]} port {port.name}: {state}, {rate}"
        found.append(Finding("InfiniBand", OK if "ACTIVE" in state else WARNING, text))
    return found or [Finding("InfiniBand", OK, "no ports")]


def disk(output_dir: str, needed: float) -> Finding:
    """Return room where the run writes (GiB), tried with a file that is written for good."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".doctor-{uuid.uuid4().hex}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(1 << 20))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        text = f"output_dir {folder} cannot be written ({error.strerror}): free space, or name another"
        return Finding("disk", FAULT, text)
    text = f"{free:.1f} GiB free in {folder}"
    if free < needed:
        return Finding("disk", FAULT, f"{text}, less than {needed:g}: free space, or name another output_dir")
    return Finding("disk", OK, text)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        return f"unreadable ({error.strerror})"


# ---- between hosts


def across_hosts(wanted: DoctorArguments, mesh: ParallelMesh) -> list[Finding]:
    """Return what must be the same everywhere. Collective."""
    return [_same_code(mesh.world), _shared(wanted.output_dir, mesh.world), _clocks(mesh.world)]


def code_version() -> str:
    """Commit, and a hash of the package's files: what a run would really execute."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        commit = f"commit {git.stdout.strip()}" if git.returncode == 0 else "no commit"
    except OSError:  # git is not installed
        commit = "no commit"
    return f"{commit}, files {digest.hexdigest()[:10]}"


def _same_code(world: Axis) -> Finding:
    versions = gather_objects((host_name(), f"{code_version()}, torch {torch.__version__}"), world)
    by_version: dict[str, list[str]] = {}
    for host, version in versions:
        if host not in by_version.setdefault(version, []):
            by_version[version].append(host)
    if len(by_version) == 1:
        return Finding("same code", OK, versions[0][1])
    text = "; ".join(f"{', '.join(hosts)}: {version}" for version, hosts in by_version.items())
    return Finding("same code", FAULT, f"{text}: bring all to one commit, else their numbers differ")


def _shared(output_dir: str, world: Axis) -> Finding:
    name = broadcast_object(f".doctor-{uuid.uuid4().hex}", world)
    file = Path(output_dir) / name
    problem = None
    if world.is_first:
        try:
            file.write_text("seen")
        except OSError as error:
            problem = error.strerror
    problem = broadcast_object(problem, world)
    seen = gather_objects((host_name(), _seen(file)), world)
    if world.is_first:
        file.unlink(missing_ok=True)
    if problem is not None:
        return Finding("shared folder", FAULT, f"{output_dir} cannot be written by rank 0 ({problem})")
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        text = f"{output_dir}: {', '.join(blind)} does not see what rank 0 writes there"
        return Finding("shared folder", FAULT, text)
    return Finding("shared folder", OK, f"{output_dir} is one folder on all hosts")


def _seen(file: Path, patience: float = 3.0) -> bool:
    deadline = time.monotonic() + patience  # a network file system may show it late
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _clocks(world: Axis) -> Finding:
    dist.barrier()  # all read their clocks within a round trip
    times = gather_objects((host_name(), time.time()), world)
    first = times[0][1]
    host, skew = max(((host, abs(now - first)) for host, now in times), key=lambda one: one[1])
    if skew > SKEW:
        return Finding("clocks", WARNING, f"{host} is {skew:.0f} s away from {times[0][0]}: set up NTP")
    return Finding("clocks", OK, f"within {skew:.2f} s of one another")


@dataclass(frozen=True)
class MeasuredLink:
    """One way between two ranks: seconds of a small message, bytes a second of a large one."""

    axis: str
    ranks: tuple[int, int]
    between: str
    inside: bool
    latency: float
    bandwidth: float | None  # bytes a second; None: not measurable, the message took no longer than an empty one

    def __str__(self) -> str:
        speed = "bandwidth not measurable" if self.bandwidth is None else f"{self.bandwidth / 1e9:.2f} GB/s"
        return f"{self.between}: {speed}, {self.latency * 1e6:.0f} us"


def links(mesh: ParallelMesh, hosts: Sequence[str], device: torch.device) -> list[Finding]:
    """Check reductions over each axis, and every link between its neighbours. Collective."""
    findings = []
    for name in ("tp", "dp", "pp"):
        axis: Axis = getattr(mesh, name)
        measured = _reduction(axis, device) if axis.size > 1 else None
        speeds = [one for one in gather_objects(measured, mesh.world) if one is not None]
        if not speeds:
            continue
        text = f"all-reduce over {name} of {axis.size}: {min(speeds) / 1e9:.2f} GB/s on the slowest rank"
        findings.append(Finding(f"{name} all-reduce", OK, text))
    found: dict[tuple[int, int], MeasuredLink] = {}
    for name in ("tp", "dp", "pp"):
        for pair in _pairs(gather_objects(getattr(mesh, name).ranks, mesh.world)):
            if pair not in found:
                found[pair] = _measure(name, pair, mesh.world, hosts, device)
    return findings + judge_links([*found.values()])


def _pairs(groups: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return the neighbours of every group, once each."""
    return sorted({pair for ranks in groups for pair in zip(ranks, ranks[1:], strict=False)})


def judge_links(found: Sequence[MeasuredLink]) -> list[Finding]:
    """Return the slow ones by name, and one row for the others of each kind. Pure."""
    findings = []
    for inside in (True, False):
        kind = [link for link in found if link.inside == inside]
        if not kind:
            continue
        measured = [link for link in kind if link.bandwidth is not None]
        usual = statistics.median(link.bandwidth for link in measured) if measured else 0.0
        slow = [link for link in measured if link.bandwidth < usual / SLOW or (not inside and link.bandwidth < FLOOR)]
        slow += [link for link in kind if link not in slow and not inside and link.latency > LATE]
        where = "inside a host" if inside else "between hosts"
        for link in slow:
            text = f"{link}: slow; look at the cable, the port and the interface of both hosts"
            findings.append(Finding(f"{link.axis} link", WARNING, text))
        unknown = [link for link in kind if link.bandwidth is None and link not in slow]
        if unknown:
            text = f"{len(unknown)} {where} too noisy to measure, for example {unknown[0]}: run it again on idle hosts"
            findings.append(Finding("links", WARNING, text))
        good = [link for link in measured if link not in slow]
        if good:
            worst = min(good, key=lambda link: link.bandwidth)
            findings.append(Finding("links", OK, f"{len(good)} {where}, the slowest {worst}"))
    return findings


def _reduction(axis: Axis, device: torch.device) -> float:
    """Return the bytes a second that a ring of this size moves over each link: the median of ROUNDS reductions."""
    size = MESSAGE[device.type]
    tensor = torch.zeros(size // 4, device=device)
    small = torch.zeros(1, device=device)
    all_reduce(small, axis)
    seconds = statistics.median(_timed(lambda: all_reduce(tensor, axis), device) for _ in range(ROUNDS))
    return 2 * (axis.size - 1) / axis.size * size / seconds


def _measure(name: str, pair: tuple[int, int], world: Axis, hosts: Sequence[str], device: torch.device) -> MeasuredLink:
    """Send to and fro between two ranks while the others wait. Collective."""
    times = None
    if world.rank in pair:
        small, large = torch.zeros(1, device=device), torch.zeros(MESSAGE[device.type] // 4, device=device)
        _ping(pair, world.rank, small)
        empty = [_timed(lambda: _ping(pair, world.rank, small), device) / 2 for _ in range(PINGS)]
        full = [_timed(lambda: _ping(pair, world.rank, large), device) / 2 for _ in range(ROUNDS)]
        times = (statistics.median(empty), bandwidth(empty, full, large.numel() * large.element_size()))
    latency, speed = gather_objects(times, world)[pair[0]]
    a, b = pair
    between = f"rank {a} on {hosts[a]} - rank {b} on {hosts[b]}"
    return MeasuredLink(name, pair, between, hosts[a] == hosts[b], latency, speed)


def bandwidth(empty: Sequence[float], full: Sequence[float], nbytes: int) -> float | None:
    """Return bytes a second from one-way times of empty messages and of messages of `nbytes`, in seconds.

    It is nbytes over the difference of the medians; None where that difference is within the spread of the times, so
    that a number would be noise.
    """
    seconds = statistics.median(full) - statistics.median(empty)
    spread = statistics.median(abs(one - statistics.median(times)) for times in (empty, full) for one in times)
    return nbytes / seconds if seconds > max(spread, 1e-6) else None


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes, on the device too."""
    begun = time.perf_counter()
    work()
    _finished(device)
    return time.perf_counter() - begun


def _ping(pair: tuple[int, int], rank: int, tensor: torch.Tensor) -> None:
    if rank == pair[0]:
        dist.send(tensor, pair[1])
        dist.recv(tensor, pair[1])
    else:
        dist.recv(tensor, pair[0])
        dist.send(tensor, pair[0])


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
