"""Whether the values of a configuration are of the kinds that the code behind it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, get_type_hints

from dtvla.errors import UserError


def check_kinds(group: str, kinds: type | Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse values of another type than declared, unknown names and absent ones; nothing is converted.

    Args:
        group: of the settings, "" for the top.
        kinds: a class whose constructor takes them, or types by name.
        values: by name.

    Raises:
        UserError: names the first setting that does not fit.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

    fields = kinds if isinstance(kinds, Mapping) else _parameters(kinds)
    declared: Any = TypedDict("declared", dict(fields))  # type: ignore[misc]
    rules = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        TypeAdapter(with_config(rules)(declared)).validate_python(dict(values))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        key = str(faults[0]["loc"][0])
        name = f"{group}.{key}" if group else key
        if faults[0]["type"] == "missing":
            raise UserError(f"{name}: not given; set {name}=...") from None
        if faults[0]["type"] == "extra_forbidden":
            raise UserError(f"{name}: there is no such setting; there are {', '.join(sorted(fields))}") from None
        wanted = [fault["msg"].removeprefix("Input should be ") for fault in faults if fault["loc"][0] == key]
        raise UserError(f"{name}: found {values[key]!r}, expected {' or '.join(dict.fromkeys(wanted))}") from None


def _parameters(kind: type) -> dict[str, Any]:
    """Type of every parameter of a constructor."""
    hints = get_type_hints(kind if hasattr(kind, "__dataclass_fields__") else vars(kind)["__init__"])
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: hints[p.name] if p.default is p.empty else NotRequired[hints[p.name]] for p in parameters}
