"""What keeps the tests off the network."""

from __future__ import annotations

import socket


class NetworkError(AssertionError):
    """A test tried to reach another machine."""


def guard(monkeypatch) -> None:
    """Refuse every connection but those to this machine, every look-up of a name, and pip's index."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            raise NetworkError(f"a test connects to {address}")
        return connect(self, address)

    def lookup(host, *args, **kwargs):
        raise NetworkError(f"a test looks up {host}")

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    # Processes that a test starts inherit this one.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
