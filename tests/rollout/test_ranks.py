"""Processes of torchrun: who they are, and that every episode belongs to exactly one of them."""

import pytest

from dtvla.errors import UserError
from dtvla.rollout.ranks import Ranks, join_ranks

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
