"""Processes that share episodes: who they are, that every episode belongs to one of them, that none waits in vain."""

import threading
from collections.abc import Callable

import pytest

from dtvla.errors import UserError
from dtvla.rollout.ranks import Abandoned, Ranks, agree, join_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_item_belongs_to_one_process(count: int) -> None:
    items = list(range(21))
    shares = [Ranks(index, count).share(items) for index in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_without_torchrun_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_ranks() == Ranks(0, 1, 0, 1)
    for name, value in zip(VARIABLES, "0101", strict=True):
        monkeypatch.setenv(name, value)
    assert join_ranks().first
    join_ranks().wait()


@pytest.mark.parametrize("found", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "x", "RANK": "0"}])
def test_half_set_variables_are_named(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> None:
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"WORLD_SIZE={found['WORLD_SIZE']}: .* start with torchrun"):
        join_ranks()


def threads(count: int, parts: list[Callable[[], object]]) -> list[object]:
    """What `agree` returns or raises on each of so many ranks."""
    meeting, given, outcomes = threading.Barrier(count, timeout=20), [None] * count, [None] * count

    def rank(index: int) -> None:
        def exchange(own: object) -> list[object]:
            given[index] = own
            meeting.wait()
            return list(given)

        try:
            outcomes[index] = agree(exchange, parts[index])
        except BaseException as error:
            outcomes[index] = error

    running = [threading.Thread(target=rank, args=(index,)) for index in range(count)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    return outcomes


class Asked(BaseException):
    """As a signal's handler raises it."""


def fail(error: BaseException) -> object:
    raise error


def test_ranks_tell_each_other_what_they_did() -> None:
    assert threads(3, [lambda i=i: f"share {i}" for i in range(3)]) == [["share 0", "share 1", "share 2"]] * 3


@pytest.mark.parametrize(("error", "stopped"), [(UserError("disk: full"), False), (Asked(), True)])
def test_no_rank_waits_for_one_that_cannot_go_on(error: BaseException, stopped: bool) -> None:
    first, second, third = threads(3, [lambda: 1, lambda: fail(error), lambda: 3])
    assert second is error
    for other in (first, third):
        assert isinstance(other, Abandoned)
        assert other.stopped is stopped
        assert str(other).startswith(f"rank 1: {type(error).__name__}")


def test_ctrl_c_is_not_exchanged() -> None:
    """It reaches all ranks by itself, and a rank that it has ended answers no more."""
    with pytest.raises(KeyboardInterrupt):
        agree(lambda own: pytest.fail("exchanged"), lambda: fail(KeyboardInterrupt()))
