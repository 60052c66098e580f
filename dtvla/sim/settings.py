"""What an environment can be told, and what it gives, known without importing the simulator."""

from typing import Any, Literal, get_args

from dtvla.errors import UserError

Quality = Literal["full", "draft", "none"]
Stepping = Literal["exact", "fast"]
ACTION_DIM = 7
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Name in an observation -> name of the camera in LIBERO's model."""


def check_settings(*, render: Any, stepping: Any, image_size: Any, settle_steps: Any, max_steps: Any = None) -> None:
    """Refuse what :class:`dtvla.sim.env.LiberoEnv` can't be made with.

    Raises:
        UserError: names the setting.
    """
    for name, value, choices in (("render", render, get_args(Quality)), ("stepping", stepping, get_args(Stepping))):
        if value not in choices:
            raise UserError(f"{name}: {value!r} is unknown; use {', '.join(choices[:-1])} or {choices[-1]}")
    for name, value, least, usual in (("image_size", image_size, 1, 256), ("settle_steps", settle_steps, 0, 10)):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name}: {value!r} is not a whole number from {least} on; {usual} is usual")
    check_step_limit(max_steps)


def check_step_limit(max_steps: Any) -> None:
    """Refuse what is neither a number of steps nor null.

    Raises:
        UserError: names the setting.
    """
    if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 1):
        raise UserError(f"max_steps: {max_steps!r} is not a number of steps; use 1 or more, or null for the protocol's")
