"""The pool between the jobs of a sweep: kept when it fits, ended when it does not or when a job broke."""

from collections.abc import Iterator

import pytest

from dtvla.rollout.shared_pool import close_shared_pool, shared_pool

SETTINGS = {"image_size": 32, "render": "none", "protocol": "published", "settle_steps": 0}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    close_shared_pool()
    yield
    close_shared_pool()


def test_a_pool_is_kept_for_equal_settings_and_replaced_for_others() -> None:
    with shared_pool(1, **SETTINGS) as first:
        pass
    with shared_pool(1, **SETTINGS) as again:
        assert again is first
    with shared_pool(1, **{**SETTINGS, "image_size": 48}) as other:
        assert other is not first
    with pytest.raises(RuntimeError, match="not open"):
        first.start(0, None)  # type: ignore[arg-type]


def test_a_pool_is_closed_when_its_user_broke() -> None:
    with pytest.raises(KeyboardInterrupt), shared_pool(1, **SETTINGS) as broken:
        raise KeyboardInterrupt
    with shared_pool(1, **SETTINGS) as fresh:
        assert fresh is not broken
