"""How a training runs on several ranks: FSDP2 with checkpoints that are written while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from dtvla.learning import checkpoint_folder as folders


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all ranks; the module shards its model in ``configure_model``.

    Checkpoints are folders, see :mod:`dtvla.learning.checkpoint_folder`. Both these and the single files of other
    strategies can be continued from, with any number of ranks.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        """Shard over all ranks.

        Args:
            process_group_backend: of torch.distributed; None chooses by the device.
        """
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)
        self.writer = folders.FolderWriter()

    def setup_environment(self) -> None:
        """Set the number of shards, which is known by now, and connect the ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards of the weights."""
        return get_model_state_dict(self._module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's shards of the optimiser's state, by names of weights."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(self._module, plain)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Begin to write; :class:`UserError` when the one before could not be written."""
        weights, (optimizer,) = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states")
        tensors = {folders.WEIGHTS: weights, folders.MOMENTS: optimizer["state"]}
        self.writer.start(Path(filepath), tensors, {**checkpoint, folders.GROUPS: optimizer["param_groups"]})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load shards, or this rank's share of a single file; returns the rest.

        Raises:
            UserError: files are missing or damaged.
        """
        path = Path(self.broadcast(checkpoint_path))
        (optimizer,) = self.optimizers
        strict = self._module.strict_loading
        if path.is_dir():
            rest = folders.read_meta(path)
            weights = folders.read_shards(path, folders.WEIGHTS, get_model_state_dict(self._module))
            own: Any = get_optimizer_state_dict(self._module, optimizer)["state"]
            moments, groups = folders.read_shards(path, folders.MOMENTS, own), rest.pop(folders.GROUPS)
        else:
            rest = folders.read_meta(path, mmap=True)
            weights, (state,) = rest.pop("state_dict"), rest.pop("optimizer_states")
            names = {parameter: name for name, parameter in self._module.named_parameters()}
            order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            moments, groups = folders.by_name(state, order)
        options = StateDictOptions(full_state_dict=not path.is_dir(), strict=strict)
        set_model_state_dict(self._module, weights, options=options)
        state = {"state": moments, "param_groups": groups}
        set_optimizer_state_dict(self._module, optimizer, state, options=options)
        return rest

    def teardown(self) -> None:
        """Wait for the last checkpoint."""
        self.writer.finish()
        super().teardown()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module
