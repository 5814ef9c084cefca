"""CPU seconds of each test, its processes included: `pytest --cpu_times FILE`, then `python tests/cpu_times.py FILE`.

Wall time says little where several processes share the cores; this hardly changes with what else runs. Daemons, which
leave the tree of processes, are not counted (the jobs of tests/test_slurm.py).
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TICK = os.sysconf("SC_CLK_TCK")


class CpuTimes:
    """A pytest plugin that appends a line a test to `file`: seconds, a tab, its node id."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = spent()
        try:
            return (yield)
        finally:
            with self.file.open("a") as file:  # short lines, appended whole: the workers of xdist share the file
                file.write(f"{spent() - before:.2f}\t{item.nodeid}\n")


def spent() -> float:
    """CPU seconds of this process, of its children that ended and of its descendants that run (Linux's /proc)."""
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        seconds[pid] = sum(map(int, fields[11:15])) / TICK  # utime, stime and those of children that were waited for

    def ours(pid: int) -> bool:
        while pid and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return sum(seconds[pid] for pid in seconds if ours(pid))


def main(file: Path, tests: int = 40) -> None:
    """Print the sums of folders and of files and the costliest tests."""
    times = [
        (float(seconds), name) for seconds, name in (line.split("\t", 1) for line in file.read_text().splitlines())
    ]
    for group in (lambda name: name.partition("::")[0].rpartition("/")[0], lambda name: name.partition("::")[0]):
        sums: dict[str, float] = defaultdict(float)
        for seconds, name in times:
            sums[group(name)] += seconds
        for name, seconds in sorted(sums.items(), key=lambda pair: -pair[1])[:tests]:
            print(f"{seconds:8.1f}  {name}")
        print()
    for seconds, name in sorted(times, reverse=True)[:tests]:
        print(f"{seconds:8.2f}  {name}")
    print(f"{sum(seconds for seconds, _ in times):8.1f}  all {len(times)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
