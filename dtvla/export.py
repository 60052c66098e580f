"""``dtvla export``: write a checkpoint in the published or in dtvla's format, adapters merged, and push it to a hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dtvla.cli import entry
from dtvla.errors import UserError

if TYPE_CHECKING:
    import torch

    from dtvla.policy.hub import Source
    from dtvla.policy.processor import Processor

FORMATS = ("published", "dtvla", "adapter")
DTYPES = ("float32", "bfloat16")


@entry("export")
def main(cfg: DictConfig) -> None:
    """Run the command."""
    export(cfg)


def export(cfg: DictConfig) -> Path:
    """Write the checkpoint that ``conf/export.yaml`` describes; the folder appears complete or not at all.

    Returns:
        The folder.

    Raises:
        UserError: a setting is wrong, the folder exists, or the checkpoint can't be read or lacks what it needs.
    """
    for key in ("checkpoint", "output"):
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"{key}: none was given; add {key}=FOLDER")
    if cfg.format not in FORMATS:
        raise UserError(f"format: {cfg.format!r} is unknown; use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if cfg.dtype is not None and cfg.dtype not in DTYPES:
        raise UserError(f"dtype: {cfg.dtype!r} is unknown; use null (as stored), {' or '.join(DTYPES)}")
    output = Path(str(cfg.output)).expanduser()
    if output.exists():
        raise UserError(f"output: {output} exists already; choose another folder")
    _check_size(str(cfg.shard_size))
    if cfg.push_to_hub is not None:
        _check_repository(str(cfg.push_to_hub))
    from dtvla.learning.snapshot import policy_folder
    from dtvla.policy.hub import locate, push

    with policy_folder(str(cfg.checkpoint), output.parent) as folder:
        source = locate(folder)
        write = _copy_adapter if cfg.format == "adapter" else _write
        write(cfg, source, output)
    if cfg.push_to_hub is not None:
        print(f"pushed: {push(output, str(cfg.push_to_hub), private=bool(cfg.private))}")
    return output


def _write(cfg: DictConfig, source: Source, output: Path) -> None:
    import torch

    from dtvla.policy import adapters, checkpoint, compat, published, weights
    from dtvla.policy.placement import type_name
    from dtvla.policy.policy import Policy

    behaviour = compat.Compat.from_config(_plain(cfg.compat))
    is_base = source.policy_file is None and source.statistics_file is None
    if is_base and cfg.format == "dtvla":
        raise UserError(f"format: {source.folder} has no norm_stats.json, which dtvla's format contains; use published")
    processor = None if is_base else checkpoint.read_processor(source)
    # Adapters are merged in float32, and rounded once.
    wanted: torch.dtype | None = None if cfg.dtype is None else getattr(torch, cfg.dtype)
    model = checkpoint.read_model(source, torch.float32 if wanted == torch.float32 else None)
    if adapters.has_adapter(model):
        adapters.merge(model)
    if wanted is not None:
        model.to(wanted)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    if processor is not None:
        compat.apply(Policy(model, processor), behaviour)
    with weights.new_folder(output) as folder:
        if cfg.format == "published":
            count = published.write(model, processor, source, folder, str(cfg.shard_size))
        else:
            assert processor is not None
            checkpoint.write(Policy(model, processor), folder, str(cfg.shard_size))
            count = len(weights.find_weights(folder))
        card = folder / published.CARD_FILE
        if not card.is_file():
            card.write_text(_card(cfg, source, model.dtype, processor), encoding="utf-8")
    print(f"{count} weights ({type_name(model.dtype)}): {output}")


def _copy_adapter(cfg: DictConfig, source: Source, output: Path) -> None:
    from dtvla.policy import weights

    if not source.adapters:
        raise UserError(f"format: {source.folder} has no adapter; use published or dtvla")
    if cfg.dtype is not None:
        raise UserError(f"dtype: {cfg.dtype}, but an adapter keeps its type; use null")
    with weights.new_folder(output) as folder:
        shutil.copytree(source.adapters[-1], folder, dirs_exist_ok=True)
    print(f"adapter to {source.name}: {output}")


def _card(cfg: DictConfig, source: Source, dtype: torch.dtype, processor: Processor | None) -> str:
    """The model card: what the checkpoint is, where it comes from, how to use it."""
    from huggingface_hub import ModelCard, ModelCardData

    from dtvla import __version__
    from dtvla.policy.placement import type_name

    # A path on somebody's disk is nobody else's base model.
    base = None if Path(source.name).expanduser().exists() else source.name.partition("@")[0]
    data = ModelCardData(
        library_name="dtvla",
        pipeline_tag="robotics",
        base_model=base,
        tags=["vision-language-action", "paligemma", "deepthinkvla", "libero"],
    )
    name = Path(str(cfg.push_to_hub or cfg.output)).name
    facts = [f"weights: {type_name(dtype)}, {cfg.format} format", f"written by: dtvla {__version__}"]
    if source.adapters:
        facts.append("adapters: merged")
    if processor is not None:
        layout, normalizer = processor.layout, processor.normalizer
        facts += [
            f"cameras: {', '.join(processor.images.cameras)}, {processor.images.image_size} pixels",
            f"actions: {layout.chunk} steps of {layout.action_dim} dimensions, {layout.bins.count} bins",
            f"normalisation: {normalizer.method}, statistics {normalizer.statistics.digest()[:12]}",
        ]
    listed = "\n".join(f"- {fact}" for fact in facts)
    use = f"dtvla evaluate checkpoint={cfg.push_to_hub or 'FOLDER'} env=libero_object"
    text = f"A vision-language-action policy that thinks in words before it acts.\n\n{listed}\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{text}\n```bash\n{use}\n```\n"))


def _check_size(size: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError:
        raise UserError(f"shard_size: {size!r} is not a size; write 5GB, 500MB or the like") from None


def _check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name_is_whole = False
    else:
        name_is_whole = "/" in name
    if not name_is_whole:
        raise UserError(f"push_to_hub: {name!r} is not OWNER/NAME; give both")


def _plain(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


if __name__ == "__main__":
    main()
