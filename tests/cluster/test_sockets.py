"""What a process listens on is found, with the addresses that people know."""

import os
import socket

import pytest

from megalora.cluster.sockets import address_of, is_loopback, listening

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="reads Linux's /proc/net/tcp")


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("::1", True)])
def test_listening_sockets_are_found(host, loopback):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no address {host} here")
    with listener:
        port = listener.getsockname()[1]
        assert (host, port) in listening([os.getpid()]) and is_loopback(host) == loopback
        assert (host, port) not in listening([os.getppid(), 2**30])
    assert (host, port) not in listening([os.getpid()])


def test_addresses_as_people_write_them():
    assert address_of("0100007F") == "127.0.0.1"
    assert address_of("0000000000000000FFFF00000100007F") == "127.0.0.1"
