"""The socket that a page is served on."""

from __future__ import annotations

import socket


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: address, of IPv4 or IPv6, or a name.
        port: 0 takes a free one.

    Raises:
        ValueError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on port {port} of {host} ({error}); take another --port or --host") from None


def address(server: socket.socket) -> str:
    """What to open in a browser."""
    host, port = server.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
