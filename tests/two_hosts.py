"""Two hosts with addresses of their own on this machine: network namespaces joined by a cable (veth). Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

ADDRESSES = ("10.251.0.1", "10.251.0.2")
NAMES = ("hosta", "hostb")


def why_not() -> str | None:
    """What this machine lacks; None where it can have them."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2, util-linux, hostname)"
    try:
        with TwoHosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


class TwoHosts:
    """`with TwoHosts() as hosts: subprocess.run(hosts.on(0, ["hostname"]))`; all of it goes away at the end."""

    def __init__(self) -> None:
        mark = f"{os.getpid() % 100000}"
        self._spaces = (f"megalora-a{mark}", f"megalora-b{mark}")
        self.cables = (f"mla{mark}", f"mlb{mark}")

    def __enter__(self) -> TwoHosts:
        try:
            for space in self._spaces:
                _run("ip", "netns", "add", space)
            ends = [("name", cable, "netns", space) for cable, space in zip(self.cables, self._spaces, strict=True)]
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for number, space in enumerate(self._spaces):
                _run("ip", "-n", space, "addr", "add", f"{ADDRESSES[number]}/24", "dev", self.cables[number])
                _run("ip", "-n", space, "link", "set", "lo", "up")
            self.link(up=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def link(self, up: bool) -> None:
        """Plugs the cable in, or out."""
        for number in (0, 1) if up else (0,):
            _run("ip", "-n", self._spaces[number], "link", "set", self.cables[number], "up" if up else "down")

    def shape(self, *queue: str) -> None:
        """`tc qdisc` of the cable at the first host, e.g. "tbf", "rate", "10mbit", ...; none: as it was."""
        change = ("add", "dev", self.cables[0], "root", *queue) if queue else ("del", "dev", self.cables[0], "root")
        _run("tc", "-n", self._spaces[0], "qdisc", *change)

    def on(self, number: int, command: Sequence[object]) -> list[str]:
        """The command line that runs `command` on a host, which has a name of its own too."""
        named = ["sh", "-c", f'hostname {NAMES[number]} && exec "$@"', "sh", *map(str, command)]
        return ["ip", "netns", "exec", self._spaces[number], "unshare", "--uts", *named]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
