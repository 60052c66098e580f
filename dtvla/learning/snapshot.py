"""A checkpoint of a training that is not finished, as the folder of a policy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtvla.errors import UserError
from dtvla.learning.run_folder import RunFolder

SUFFIX = ".ckpt"
MODEL = "model."  # of the training module, in front of the model's names


@contextmanager
def policy_folder(name: str, beside: Path) -> Iterator[str]:
    """Lend the folder of a policy; what is no training's checkpoint is lent as it is.

    Args:
        name: ``<run>/checkpoints/<...>.ckpt``, a file or several ranks' shards; or anything else.
        beside: where the folder may be made for as long as the context is open.

    Raises:
        UserError: the checkpoint is damaged, or its run folder is not around it.
    """
    path = Path(name).expanduser()
    if path.suffix != SUFFIX:
        yield name
        return
    if not path.exists():
        raise UserError(f"checkpoint: {path} does not exist")
    from dtvla.learning.checkpoint_folder import read_weights
    from dtvla.policy import checkpoint

    processor = RunFolder(path.absolute().parent.parent).processor
    if not processor.is_dir():
        raise UserError(f"checkpoint: {path} holds weights only, and {processor} is missing; copy the run folder whole")
    weights = read_weights(path.resolve())  # where it leads now; a training may replace it meanwhile
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".snapshot.", dir=beside) as temporary:
        shutil.copytree(processor, temporary, dirs_exist_ok=True)
        checkpoint.add_weights(Path(temporary), {key.removeprefix(MODEL): tensor for key, tensor in weights.items()})
        yield temporary
