"""Whether there is a network, asked before anything that would wait for one."""

import socket


def online(host: str) -> bool:
    """Whether `host` answers within two seconds."""
    try:
        socket.create_connection((host, 443), timeout=2).close()
        return True
    except OSError:
        return False
