"""A limit on how long a part of a server's start may take."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def time_limit(seconds: float, what: str, way_out: str) -> Iterator[None]:
    """End the process where a part of its start stalls, as a GPU's work can without an error.

    Args:
        seconds: the limit.
        what: the part, for the message.
        way_out: how to start without it.
    """

    def stop() -> None:
        logger.critical("%s took more than %.0f s: start again with %s", what, seconds, way_out)
        faulthandler.dump_traceback()
        os._exit(1)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
