"""The one exception that users are meant to read."""

from collections.abc import Collection


class UserError(Exception):
    """Something that the user can mend: a setting, a path, a file, a missing system package.

    The message is one sentence or two in the form ``setting: what was found; what to do``. Entry points print it
    without a stack and exit with code 2 (see :mod:`dtvla.cli`). Anything else that is raised is a defect of dtvla.
    """

    def __init__(self, message: str) -> None:
        """Keep the message alone where torch hands on one of a loader's process, with the stack around it."""
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2])


def check_keys(group: str, found: Collection[str], known: Collection[str]) -> None:
    """Refuse settings that a group does not have.

    Raises:
        UserError: names them, and those that there are.
    """
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise UserError(f"{group}: unknown setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
