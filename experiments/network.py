"""Whether there is a network, asked before anything that would wait for one."""

import socket
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

PORTS = {"http": 80, "https": 443}


def online(url: str) -> bool:
    """Whether the server of `url`, or the proxy before it, answers within two seconds."""
    server = urlparse(url)
    proxy = getproxies().get(server.scheme)
    if proxy and not proxy_bypass(server.hostname or ""):
        server = urlparse(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = server.port or PORTS[server.scheme]
        socket.create_connection((server.hostname or "", port), timeout=2).close()
        return True
    except (OSError, ValueError, KeyError):
        return False
