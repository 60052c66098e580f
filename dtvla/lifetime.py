"""Processes that end with the one that started them, however that one ends."""

import os
import threading
import time
from functools import cache


@cache  # one thread is enough
def end_with(parent: int) -> None:
    """End this process when its parent is gone, even in the middle of something that can't be interrupted.

    Args:
        parent: process id of the parent.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
