"""The folder of a training run: what may be begun, continued or only looked at."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtvla.errors import UserError
from dtvla.locks import try_lock

# Settings that decide the final weights. The others may change on resume (workers, logging, checkpoints, callbacks).
DECISIVE = (
    "seed",
    "model",
    "data",
    "algorithm",
    "callbacks.ema",
    "trainer.max_steps",
    "trainer.precision",
    "trainer.overfit_batches",
)
HARMLESS = (
    "data.cache",
    "data.cache_dir",
    "data.download_dir",
    "data.num_workers",
    "data.workers",
    "data.folder",
    "data.speculate",
    "data.max_rounds",
    "data.held_out",
    "algorithm.reference.offload",
    "algorithm.stop_at_log_ratio",
    "algorithm.micro_batch_size",
    "algorithm.pack_tokens",
    "model.attention",
    "model.compile",
    "model.compile_budget",
    "model.gradient_checkpointing",
)
PROCESSOR = "processor"
PATIENCE_S = 15  # loader processes of a training that was killed hold its lock for some seconds


@dataclass(frozen=True)
class RunFolder:
    """Paths and state of one run.

    Attributes:
        path: the folder: config.yaml, metrics.csv, processor/, checkpoints/, tensorboard/, rollouts/, best/, policy/,
            result.json.
    """

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that a resume starts from: a file, or a folder of several ranks' shards."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def processor(self) -> Path:
        """The policy without its weights, so that checkpoints can be exported while training goes on."""
        return self.path / PROCESSOR

    @property
    def policy(self) -> Path:
        """The trained policy, written when training is complete."""
        return self.path / "policy"

    @property
    def best(self) -> Path:
        """The policy that was most successful in rollouts, if there were any."""
        return self.path / "best"

    @property
    def result_file(self) -> Path:
        """Final metrics, written last: a run that has it is finished."""
        return self.path / "result.json"

    def begin(self, config: Mapping[str, Any], resume: bool) -> Path | None:
        """Decide how the run starts; nothing is written.

        Args:
            config: the composed configuration, plain values.
            resume: whether to continue what is there.

        Returns:
            The checkpoint to continue from, or None for a start from nothing.

        Raises:
            UserError: the folder holds another run's work and ``resume`` is false, or its settings differ.
        """
        started = any(
            path.exists() or path.is_symlink() for path in (self.checkpoint, self.policy, self.best, self.result_file)
        )
        if started and not resume:
            raise UserError(
                f"name: {self.path} already holds a training run; continue it with resume=true, or train under "
                "another name=..."
            )
        if started:
            self._check_settings(config)
        if self.checkpoint.is_symlink() and not self.checkpoint.exists():
            target = self.checkpoint.readlink()
            raise UserError(f"resume: {self.checkpoint} leads to {target}, which is not there; copy the folder whole")
        return self.checkpoint if self.checkpoint.exists() else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training here; wait a little for one that has just ended.

        Raises:
            UserError: another process goes on training here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            deadline = time.monotonic() + PATIENCE_S
            while not try_lock(lock):
                if time.monotonic() > deadline:
                    raise UserError(f"name: another process is training in {self.path}; wait for it to end")
                time.sleep(0.1)
            yield

    def record(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, which a resume compares its settings with."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "config.yaml", _to_yaml(config))

    def result(self) -> dict[str, Any] | None:
        """Final metrics and facts of a finished run, else None."""
        if not self.result_file.is_file():
            return None
        values: dict[str, Any] = json.loads(self.result_file.read_text())
        return values

    def finish(self, values: Mapping[str, Any]) -> None:
        """Write the final metrics; the run counts as finished from here on."""
        _write(self.result_file, json.dumps(values, indent=2) + "\n")

    def _check_settings(self, config: Mapping[str, Any]) -> None:
        path = self.path / "config.yaml"
        if not path.is_file():
            raise UserError(f"resume: {path} is missing, so settings can't be compared; train under another name=...")
        import yaml

        before, now = dict(_flat(yaml.safe_load(path.read_text()))), dict(_flat(config))
        keys = [key for key in sorted({*before, *now}) if _is_decisive(key) and before.get(key) != now.get(key)]
        if keys:
            changes = ", ".join(f"{key} ({before.get(key)} before, {now.get(key)} now)" for key in keys)
            raise UserError(f"resume: {self.path} began with {changes}; restore these settings or use another name=...")


def _is_decisive(key: str) -> bool:
    def within(groups: tuple[str, ...]) -> bool:
        return any(key == group or key.startswith(f"{group}.") for group in groups)

    return within(DECISIVE) and not within(HARMLESS)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _to_yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
