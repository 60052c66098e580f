"""A simulator pool that outlives one evaluation.

Hydra's multirun runs the jobs of a sweep one after another in one process. Creating a LIBERO environment takes 5 to 10
seconds, so the pool of the previous job is used again when it fits.
"""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dtvla.sim.pool import EnvPool

_kept: dict[tuple[Any, ...], EnvPool] = {}


@contextmanager
def shared_pool(workers: int, **settings: Any) -> Iterator[EnvPool]:
    """Lend a pool of `workers` with these settings of :class:`EnvPool`; one is kept until another is asked for.

    When the body raises, the pool is closed: its workers may be in the middle of something.
    """
    key = (workers, *sorted(settings.items()))
    if key not in _kept:
        close_shared_pool()
        _kept[key] = EnvPool(workers, **settings).__enter__()  # left by close_shared_pool
    try:
        yield _kept[key]
    except BaseException:
        close_shared_pool()
        raise


@atexit.register
def close_shared_pool() -> None:
    """Close the kept pool, if there is one."""
    while _kept:
        _, pool = _kept.popitem()
        pool.close()
