"""Run one function on several gloo ranks: `spawn(fn, world_size, *args)` returns the result of each rank.

Importing torch takes seconds, so the ranks are not started from nothing. A server process imports torch and
the module of `fn` once, runs nothing, and forks the ranks of each call: every call gets fresh processes (a
patch or a global that a test leaves behind dies with them) and still starts in a fraction of a second.

    pytest process  --request-->  server (imports only, one thread)  --fork-->  rank 0 .. world_size - 1
"""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from waiting import PATIENCE


class SpawnError(RuntimeError):
    """A rank raised, died or did not finish; the message has its traceback and what it printed."""


@dataclass(frozen=True)
class _Request:
    module: str
    file: str  # of the module: test modules cannot be imported by name
    function: str
    arguments: bytes  # pickled apart, because unpickling them may need that module
    world_size: int
    timeout: float
    grace: float
    directory: str  # store, results, errors and output of the ranks
    path: tuple[str, ...]  # sys.path of the caller


def spawn(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = PATIENCE, grace: float = 0.0
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` processes; returns their results in rank order.

    fn must be a function at the top level of a module; args and results must be picklable. Each rank has
    the default process group (gloo), one thread, and RANK, LOCAL_RANK and WORLD_SIZE in its environment.
    `timeout` is in seconds. Raises SpawnError if a rank raises or dies (with its traceback; the other ranks
    are killed, `grace` seconds later) or if any rank has not finished in time (naming those; all are killed).
    """
    if "." in fn.__qualname__:
        raise TypeError(f"spawn needs a function at the top level of a module, not {fn.__qualname__}")
    with tempfile.TemporaryDirectory(prefix="spawn-") as directory:
        request = _Request(
            module=fn.__module__,
            file=inspect.getfile(fn),
            function=fn.__qualname__,
            arguments=pickle.dumps(args),
            world_size=world_size,
            timeout=timeout,
            grace=grace,
            directory=directory,
            path=tuple(sys.path),
        )
        problem = _Server.current().call(request)
        if problem is not None:
            raise SpawnError(problem)
        return [pickle.loads(_result_file(directory, rank).read_bytes()) for rank in range(world_size)]


class _Server:
    """The caller's end of the server process; one for each pytest process, started at the first call."""

    _current: _Server | None = None

    @classmethod
    def current(cls) -> _Server:
        if cls._current is None or cls._current.process.poll() is not None:
            cls._current = cls()
        return cls._current

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | one_thread | {"CUDA_VISIBLE_DEVICES": ""},  # ranks are of CPUs, on any machine
            start_new_session=True,  # stop() reaches the ranks too, an interrupt at the terminal only us
        )
        theirs.close()
        atexit.register(self.stop)

    def call(self, request: _Request) -> str | None:
        """Run one request; returns what went wrong, or None."""
        try:
            self.connection.send(request)
            return self.connection.recv()
        except EOFError:
            return f"the server of the ranks died (exit status {self.process.wait()}); its output is above"
        except BaseException:  # KeyboardInterrupt, pytest-timeout: leave no process behind
            self.stop()
            raise

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


# ---- the server process ----


def wait_for_no_disk() -> None:
    """Let fsync look at its file alone, in this process and those forked from it: no test's machine loses its power,
    and a disk takes milliseconds each time, of thousands. Commands that tests start as they are do wait.
    """
    os.fsync = os.fstat  # OSError for what is no open file, as before


def _serve(connection: Connection) -> None:
    # Imported here once, for all the ranks to come: torch's optimizers import the compiler when they are made, which
    # would be most of a small test's time.
    import torch._dynamo  # noqa: F401
    import torch.distributed  # noqa: F401
    import torch.utils.serialization.config  # noqa: F401

    from megalora.ops.extension import has_kernels

    has_kernels("cpu")  # which loads the compiled ops
    wait_for_no_disk()
    while True:
        try:
            request = connection.recv()
        except EOFError:  # the caller is gone
            return
        try:
            connection.send(_run(request, connection))
        except BrokenPipeError:
            return


def _run(request: _Request, caller: Connection) -> str | None:
    sys.path[:] = request.path
    try:
        module = _load(request.module, request.file)
    except Exception:
        return f"the module of the function cannot be imported:\n{traceback.format_exc()}"
    threads = _other_threads()
    if threads:
        return f"importing {request.file} starts threads ({', '.join(threads)}), after which a fork is not safe"

    gc.collect()
    gc.freeze()  # else a rank's collector would write to, and so copy, all pages with objects
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_rank, args=(getattr(module, request.function), rank, request))
        for rank in range(request.world_size)
    ]
    deadline = time.monotonic() + request.timeout
    for process in ranks:
        process.start()
    try:
        running = {process.sentinel: process for process in ranks}
        while running:
            done = wait([*running, caller], max(0.0, deadline - time.monotonic()))
            if caller in done:  # it sends nothing during a call: this is its end
                raise BrokenPipeError
            for sentinel in done:
                process = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    wait([*running], request.grace)
                    return _failure(request, [process.exitcode for process in ranks])
            if not done:
                late = [rank for rank, process in enumerate(ranks) if process.sentinel in running]
                for process in running.values():
                    os.kill(process.pid, signal.SIGUSR1)  # faulthandler writes down where the rank stands
                _wait_for_traces(request, late)
                return f"no result within {request.timeout:g} s from ranks {late}{_outputs(request, late)}"
        return None
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _wait_for_traces(request: _Request, ranks: list[int], seconds: float = 5.0) -> None:
    """Let ranks that were sent SIGUSR1 write down where they stand, which a busy machine may put off."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all("most recent call first" in _outputs(request, [r]) for r in ranks):
        time.sleep(0.05)
    time.sleep(0.3)  # for the lines after the first


def _other_threads() -> list[str]:
    """The names of threads that a fork would break; none where the system does not list them."""
    tasks = Path("/proc/self/task")
    threads = [task for task in tasks.iterdir() if task.name != str(os.getpid())] if tasks.is_dir() else []
    names = [(thread / "comm").read_text().strip() for thread in threads]
    # jemalloc sees to forks itself; it comes with pyarrow, which transformers imports where it is installed.
    return [name for name in names if name != "jemalloc_bg_thd"]


def _load(name: str, file: str) -> ModuleType:
    """Import a module by its name where that leads to its file, otherwise (a test module) from the file."""
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == file:
        return sys.modules[name]
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        spec = None
    if spec is not None and spec.origin == file:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failure(request: _Request, exitcodes: list[int | None]) -> str:
    """Describe the rank that failed first: the errors of the others are mostly that a peer has gone."""
    errors = {}
    for rank in range(request.world_size):
        file = _file(request.directory, rank, "error")
        if file.exists():
            errors[rank] = pickle.loads(file.read_bytes())
    died = [rank for rank, exitcode in enumerate(exitcodes) if exitcode and rank not in errors]
    if died:
        rank = min(died, key=lambda rank: exitcodes[rank])  # a signal comes first: others leave because of it
        text = f"the process ended with exit status {exitcodes[rank]}"
    else:
        rank = min(errors, key=lambda rank: errors[rank][0])
        text = errors[rank][1]
    return f"rank {rank} of {request.world_size}:\n{text}{_outputs(request, [rank])}"


def _outputs(request: _Request, ranks: list[int]) -> str:
    text = ""
    for rank in ranks:
        file = _file(request.directory, rank, "output")
        output = file.read_text(errors="replace").strip() if file.exists() else ""
        text += f"\n--- output of rank {rank} ---\n{output}" if output else ""
    return text


def _file(directory: str, rank: int, kind: str) -> Path:
    return Path(directory) / f"rank{rank}.{kind}"


def _result_file(directory: str, rank: int) -> Path:
    return _file(directory, rank, "result")


# ---- one rank ----


def _rank(fn: Callable[..., Any], rank: int, request: _Request) -> None:
    output = os.open(_file(request.directory, rank, "output"), os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=2)
    try:
        result = _call(fn, rank, request)
        _result_file(request.directory, rank).write_bytes(pickle.dumps(result))
    except BaseException:
        error = (time.monotonic(), traceback.format_exc())
        partial = _file(request.directory, rank, "partial")
        partial.write_bytes(pickle.dumps(error))
        partial.rename(_file(request.directory, rank, "error"))
        sys.stdout.flush()
        os._exit(1)


def _call(fn: Callable[..., Any], rank: int, request: _Request) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request.world_size)}
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine whose name does not resolve must do too
    # A file as the store: a port, chosen free, may be taken before it is used.
    store = dist.FileStore(os.path.join(request.directory, "store"), request.world_size)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=request.world_size,
        timeout=datetime.timedelta(seconds=request.timeout),
    )
    result = fn(rank, request.world_size, *pickle.loads(request.arguments))
    if dist.is_initialized():
        dist.barrier()  # no rank closes its connections while another still reads from them
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    # Requests are pickled as spawn._Request, and test modules import `spawn`: both must find this module.
    sys.modules["spawn"] = sys.modules["__main__"]
    _serve(Connection(int(sys.argv[1])))
