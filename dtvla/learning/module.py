"""What all ways to train a policy share: one optimiser step over a batch that arrives in parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dtvla.errors import UserError
from dtvla.learning.optim import OptimizerSettings, build_optimizer, freeze_parts, gradient_norm
from dtvla.learning.sharding import gradient_exchange, shard
from dtvla.policy.adapters import has_adapter, is_adapter

if TYPE_CHECKING:
    from dtvla.policy.layout import Batch
    from dtvla.policy.policy import Policy
    from dtvla.policy.processor import Processor

FINGERPRINTS = "dtvla_fingerprints"
AnyBatch = TypeVar("AnyBatch", bound="Batch")


class PolicyModule(LightningModule):
    """A policy in training.

    One training step is one optimiser step on one (large) batch, which arrives cut into forward passes that fit into
    memory (:mod:`dtvla.data.grouping`). Losses are sums over tokens, so the gradient does not depend on the cut.

    Dropout is a function of (seed, step, rank): nothing random has to be saved for an exact resume.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerSettings,
        *,
        data_fingerprint: str = "",
        start: str | None = None,
        seed: int = 0,
    ) -> None:
        """Take the policy's model for training; parts with learning rate 0 are frozen.

        Args:
            policy: model and processor.
            optimizer: settings of AdamW and its schedule.
            data_fingerprint: of the data; checkpoints of other data are refused.
            start: digest of the weights that training starts from, if a resumed run needs the same ones; an adapted
                model always needs those under its adapter.
            seed: of dropout.

        Raises:
            UserError: a setting is out of range, or nothing is left to train.
        """
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.model = policy.model
        self.settings = optimizer
        self.data_fingerprint = data_fingerprint
        self.start = start
        self.seed = seed
        self.validated_step = -1
        freeze_parts(self.model, optimizer)
        self.strict_loading = not has_adapter(self.model)  # checkpoints of an adapted model hold the adapter only

    def configure_model(self) -> None:
        """Share the weights out where the strategy does; changes nothing the second time."""
        if self.device_mesh is not None:
            _ = self._start_digest  # of whole weights
            shard(self.model, self.device_mesh["data_parallel"], str(self.trainer.precision))

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule over ``trainer.max_steps``."""
        optimizer, scheduler = build_optimizer(self.model, self.settings, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout for this step."""
        digest = hashlib.sha256(f"{self.seed}/{self.global_step}/{self.global_rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def update(
        self,
        parts: Sequence[AnyBatch],
        loss: Callable[[AnyBatch], Tensor],
        check: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, dict[str, float]]:
        """One optimiser step.

        Args:
            parts: this rank's share of the batch.
            loss: what a part adds to the loss of the whole batch, over all ranks.
            check: called when the gradient is there; may raise before the weights change.

        Returns:
            The norm of the whole gradient before clipping, and the learning rates of the step by name.

        Raises:
            UserError: the gradient is not finite; nothing was updated.
        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.accumulate(parts, loss)
        check()
        norm = gradient_norm(self.model, self.settings.clip)
        if not torch.isfinite(norm):
            raise UserError(
                f"training: the gradient of step {self.global_step + 1} is not finite (the last checkpoint is from "
                "before it); lower algorithm.optimizer.lr, lengthen the warm-up, or look for defective samples"
            )
        rates = {f"lr/{group['name'].split('/')[0]}": group["lr"] for group in optimizer.param_groups}  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr]
        return norm, rates

    def accumulate(self, parts: Sequence[AnyBatch], loss: Callable[[AnyBatch], Tensor]) -> None:
        """Run forward and backward over the parts of a batch, adding to the gradient; see :meth:`update`."""
        attached = self._trainer is not None
        world = self.trainer.world_size if attached else 1  # strategies average gradients over ranks
        model: Any = self.trainer.strategy.model if attached else self.model
        for index, part in enumerate(parts):
            # Casts of an earlier part's forward would come last in this one's backward: until then, autograd would keep
            # the gradients of all cast weights (4 GB for the published model).
            torch.clear_autocast_cache()
            with gradient_exchange(model, last=index == len(parts) - 1):
                value = loss(part) * world
                self.manual_backward(value) if attached else value.backward()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what the weights were trained with: data, tokenizer, statistics, pictures, the start."""
        checkpoint[FINGERPRINTS] = self._fingerprints()
        if has_adapter(self.model):
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weights[name] for name in weights if is_adapter(name)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to continue on other data or from another start; :class:`UserError`."""
        before, now = checkpoint.get(FINGERPRINTS, {}), self._fingerprints()
        if before.get("start") != now.get("start"):
            raise UserError(
                "resume: the model in model.checkpoint changed since this run began; restore it, or train under "
                "another name=..."
            )
        if before != now:
            raise UserError(
                "resume: the dataset changed since this run began; restore it, or train under another name=..."
            )

    def _fingerprints(self) -> dict[str, str]:
        values = {"data": self.data_fingerprint, "processor": processor_digest(self.policy.processor)}
        return {**values, "start": self._start_digest} if self._start_digest else values

    @cached_property
    def _start_digest(self) -> str | None:
        if self.start is None and has_adapter(self.model):
            return weights_digest((n, weight) for n, weight in self.model.named_parameters() if not is_adapter(n))
        return self.start


def processor_digest(processor: Processor) -> str:
    """sha256 over everything that decides how an observation becomes tokens and tokens become actions."""
    words = {
        "tokenizer": processor.layout.tokenizer.backend_tokenizer.to_str(),
        "vocabulary": repr(processor.layout.vocabulary),
        "prompt": processor.layout.prompt_template.to_dict(),
        "shape": [processor.layout.image_tokens, processor.layout.chunk, processor.layout.action_dim],
        "images": processor.images.to_dict(),
        "normalizer": processor.normalizer.to_dict(),
    }
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the names and the exact sums of the bits, as integers, of (whole) weights; takes little time."""
    sums = {name: int(_as_integers(weight.detach()).sum(dtype=torch.int64)) for name, weight in weights}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _as_integers(weight: Tensor) -> Tensor:
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return weight.contiguous().view(types[weight.element_size()])
