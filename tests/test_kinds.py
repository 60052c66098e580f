"""Protects what users read when a setting is of the wrong kind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dtvla.errors import UserError
from dtvla.kinds import check_kinds


@dataclass
class Settings:
    steps: int
    share: float = 0.5
    on: bool = False
    names: list[str] | None = None
    place: Path | str = "here"


class Annotator:
    def __init__(self, *, steps: int, share: float = 0.5, names: list[str] | None = None) -> None:
        raise AssertionError("it is not made")


@pytest.mark.parametrize("values", [{"steps": 3}, {"steps": 3, "share": 1, "names": ["a"]}])
def test_what_fits_passes_and_nothing_is_made(values: dict[str, Any]) -> None:
    for kind in (Settings, Annotator):
        check_kinds("group", kind, values)
    check_kinds("", {name: int | float | list for name in values}, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"^g\.steps: not given; set g\.steps=\.\.\.$"),
        ({"steps": 1.5}, r"^g\.steps: found 1\.5, expected a valid integer$"),
        ({"steps": True}, r"^g\.steps: found True"),
        ({"steps": "3"}, r"^g\.steps: found '3'"),
        ({"steps": 3, "share": float("nan")}, r"^g\.share: found nan, expected a finite number$"),
        ({"steps": 3, "on": "no"}, r"^g\.on: found 'no', expected a valid boolean$"),
        ({"steps": 3, "names": "ab"}, r"^g\.names: found 'ab', expected a valid list$"),
        ({"steps": 3, "names": ["a", 3]}, r"^g\.names: found \['a', 3\], expected a valid string$"),
        ({"steps": 3, "place": 3}, r"^g\.place: found 3, expected an instance of Path or a valid string$"),
        ({"steps": 3, "step": 3}, r"^g\.step: there is no such setting; there are names, on, place, share, steps$"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_found_and_what_is_expected(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_kinds("g", Settings, values)
