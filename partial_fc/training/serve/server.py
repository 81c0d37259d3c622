"""The service on a port: the socket, the token, and the loop that answers.

host, port ── bound before anything is loaded ──>  a port in use is one line
beyond this machine ──>  a token: the given one, or a new one that is printed once
"""

from __future__ import annotations

import errno
import importlib
import ipaddress
import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partial_fc.training.errors import UserError

if TYPE_CHECKING:
    import uvicorn

TOKEN_VARIABLE = "PARTIAL_FC_TOKEN"
SHORTEST_TOKEN = 16
CONNECTIONS = 64
MISSING = "serving needs the package {name}, which is missing: pip install 'partial_fc[serve]'"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError that says why there is none. port 0: any that is free."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; give a number from 0 to 65535, 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host} is no name or address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CONNECTIONS)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; give another --port, or --port 0 for any that is free"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"port {port} of {host} may not be used; give a --port from 1024 on") from None
        raise UserError(f"--host {host} is no address of this machine: {error.strerror}") from None
    return listener


def _own(listener: socket.socket) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(str(listener.getsockname()[0]).partition("%")[0])


def address_of(listener: socket.socket, host: str) -> str:
    """Return the address to open in a browser."""
    if _own(listener).is_unspecified:  # it listens on all addresses of the machine
        host = socket.gethostname()
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


def token_for(listener: socket.socket, file: str | None) -> tuple[str | None, bool]:
    """Return (the token, whether it is new): of the file or of PARTIAL_FC_TOKEN; a new one beyond this machine."""
    given = os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        try:
            given = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"--token_file {file} cannot be read: {error}") from error
    if given is not None:
        if len(given) < SHORTEST_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
            raise UserError(
                f"the token is not {SHORTEST_TOKEN} or more letters and digits; "
                "make one: python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
        return given, False
    return (None, False) if _own(listener).is_loopback else (secrets.token_urlsafe(24), True)


def check_installed() -> None:
    """Raise UserError if a package of the service is missing."""
    for name in ("fastapi", "python_multipart", "uvicorn"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(MISSING.format(name=error.name)) from error


def make_server(app: Any) -> uvicorn.Server:
    """Return the server of an application; `run(sockets=[listener])` answers requests until it is asked to stop."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)
