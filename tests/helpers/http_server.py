"""A server under test, in a process of its own."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx


class HttpServer:
    """A running server.

    Args:
        url: where it listens.
        log: what it prints.
    """

    def __init__(self, url: str, log: Path) -> None:
        # A server closes idle connections when it likes, also while a request is under way to it.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=url, timeout=900, limits=limits)
        self.log = log

    def metrics(self) -> dict[str, float]:
        """Every sample by its name; those that differ in labels are listed by position or rows."""
        found: dict[str, float] = {}
        for line in self.client.get("/metrics").text.splitlines():
            sample = re.fullmatch(r"([a-z_:]+)(\{.*\})? ([-+.\deinfa]+)", line)
            if sample:
                position = re.search(r'(?:position|rows)="(\d+)"', sample[2] or "")
                name = sample[1] + (f"[{position[1]}]" if position else "")
                found[name] = found.get(name, 0.0) + float(sample[3])
        return found


def free_port() -> int:
    """A port that nothing listens on, below those that the system hands out by itself.

    A server may take seconds to listen on it, in which one of those could be given away.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@contextmanager
def started(
    kind: Callable[[str, Path], HttpServer],
    command: list[str],
    port: int,
    log: Path,
    environment: dict[str, str],
) -> Iterator[HttpServer]:
    """Run ``command``, which serves on ``port``, until it is healthy and the block is left."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    server = kind(f"http://127.0.0.1:{port}", log)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                if server.client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(60)
