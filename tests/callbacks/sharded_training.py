"""A training whose weights are sharded over processes (FSDP2 on gloo): ``python sharded_training.py OVERRIDE...``."""

import sys
from typing import Any

from hydra import compose, initialize_config_dir
from torch.distributed.fsdp import fully_shard

from dtvla.cli import config_dir
from dtvla.learning import sft
from dtvla.learning.experiment import train

STRATEGY = (
    "+trainer.strategy._target_=lightning.pytorch.strategies.ModelParallelStrategy",
    "+trainer.strategy.data_parallel_size=2",
    "+trainer.strategy.tensor_parallel_size=1",
    "+trainer.strategy.save_distributed_checkpoint=false",
    "+trainer.strategy.process_group_backend=gloo",
    "trainer.devices=2",
)


class ShardedSFTModule(sft.SFTModule):
    """Shards each layer, and what is left at the root."""

    def configure_model(self) -> None:
        model: Any = self.model
        for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(model, mesh=self.device_mesh["data_parallel"])


if __name__ == "__main__":
    sft.SFTModule = ShardedSFTModule  # type: ignore[misc]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        train(compose("train", overrides=[*STRATEGY, *sys.argv[1:]]))
