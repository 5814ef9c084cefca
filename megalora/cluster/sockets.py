"""On which addresses processes listen, as Linux tells it: what other machines of the network could reach."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_LISTENS = "0A"  # the state of a socket in /proc/net/tcp


def listening(processes: Iterable[int]) -> list[tuple[str, int]]:
    """Return (address, port) of each TCP socket on which these processes listen; those of other users are not seen."""
    mine = {inode for process in processes for inode in _sockets_of(process)}
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/self/net", table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:  # no Linux, or no IPv6
            continue
        for fields in map(str.split, lines):
            if len(fields) > 9 and fields[3] == _LISTENS and fields[9] in mine:
                address, _, port = fields[1].partition(":")
                found.add((address_of(address), int(port, 16)))
    return sorted(found)


def address_of(text: str) -> str:
    """Return an address of /proc/net/tcp, words of 4 bytes in the order of the machine, as people write it."""
    words = (int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def is_loopback(address: str) -> bool:
    """Return whether only processes of this machine reach the address."""
    return ipaddress.ip_address(address).is_loopback


def _sockets_of(process: int) -> list[str]:
    """Return the inodes of a process's sockets."""
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process}/fd")]
    except OSError:  # of another user, or gone meanwhile
        return []
    return [link[8:-1] for link in links if link.startswith("socket:[")]
