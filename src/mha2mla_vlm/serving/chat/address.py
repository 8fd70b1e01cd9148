"""Where the page is served: a host and a port that can be listened at."""

import errno
import os
import socket

from mha2mla_vlm.errors import InputError

FIRST_PORT, LAST_PORT = 7860, 7959
LOOPBACK = "127.0.0.1"  # gradio looks whether a port is free there, wherever it listens


def find_port(host: str, port: int | None) -> int:
    """`port`, or the first free one; raises `InputError` if nothing can listen there."""
    for candidate in range(FIRST_PORT, LAST_PORT + 1) if port is None else [port]:
        if all(_is_free(place, candidate) for place in dict.fromkeys((host, LOOPBACK))):
            return candidate
    if port is None:
        raise InputError(
            f"--host {host}: no port from {FIRST_PORT} to {LAST_PORT} is free; give one with --port"
        )
    raise InputError(f"--port {port} is taken; give another, or leave it out for one that is free")


def _is_free(host: str, port: int) -> bool:
    """Whether nobody listens there; raises `InputError` for what this process cannot have."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                if (
                    os.name == "posix"
                ):  # as servers do: connections that ended a moment ago are in nobody's way
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            return False
        reason = getattr(error, "strerror", None) or error
        if number == errno.EACCES:
            raise InputError(f"--port {port}: {reason}; give one from 1024 up") from None
        raise InputError(
            f"--host {host}: {reason}; give an address of this machine, {LOOPBACK} for itself or 0.0.0.0 "
            "for its whole network"
        ) from None
    return True
