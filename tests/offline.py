"""No test may leave this machine: a connection to another, or a question for its name, is an error."""

import ipaddress
import socket
import sys

_OWN = {"localhost", "ip6-localhost", "", "0.0.0.0", "::", socket.gethostname(), socket.getfqdn()}
_EVENTS = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")


class NetworkUsed(RuntimeError):
    """Not an OSError, which code that tries a network would take for its absence."""


def is_own(host) -> bool:
    """Whether it is a name or an address of this machine."""
    host = host.decode() if isinstance(host, bytes) else host
    if host is None or host in _OWN:
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback or host == socket.gethostbyname(
            socket.gethostname()
        )
    except ValueError:
        return False


def _audit(event, arguments):
    if event not in _EVENTS:
        return
    where = arguments[0] if event.startswith("socket.get") else arguments[-1]
    if isinstance(where, tuple):
        where = where[0]
    elif not event.startswith("socket.get"):
        return  # the path of a Unix socket
    if not is_own(where):
        raise NetworkUsed(f"{event}: {where!r} is not this machine, and tests use no network")


def forbid() -> None:
    """For the rest of this process."""
    sys.addaudithook(_audit)
