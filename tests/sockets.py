"""Counting of a process's open sockets."""

import os


def open_sockets(process: str = "self") -> int:
    """Return how many sockets a process has open, by default this one."""
    links = []
    for name in os.listdir(f"/proc/{process}/fd"):
        try:
            links.append(os.readlink(f"/proc/{process}/fd/{name}"))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return sum(link.startswith("socket:") for link in links)
