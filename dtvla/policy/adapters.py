"""Which weights are trained: freezing of parts, and LoRA adapters (Hu et al., 2022) made by peft.

An adapted model stays a :class:`~dtvla.policy.model.HybridVLA`: peft replaces layers in place, under their names. The
token embedding and the output layer share one weight and get a factor pair each, as in the published code. So an
adapted model, and with it a merged one, no longer has equal embeddings at both ends.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtvla.errors import UserError, check_keys
from dtvla.policy import quantization

if TYPE_CHECKING:
    from peft import LoraConfig

    from dtvla.policy.model import HybridVLA

PARTS = ("language_model", "vision_tower", "projector")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NAME = "default"
PREFIX = "base_model.model."  # of the weights' names in peft's files
WHOLE = "slot_embedding"  # as small as an adapter: trained and stored itself


@dataclass(frozen=True)
class LoraSettings:
    """Settings of an adapter; the defaults are the published ones, under which no bias is trained.

    Attributes:
        r: rank of the factors.
        alpha: the product of the factors is scaled by ``alpha / r``.
        dropout: of the factors' inputs, in training.
        parts: of :data:`PARTS` that are adapted; the others keep their weights.
        modules: last part of the layers' names; None for all linear and embedding layers.
    """

    r: int = 64
    alpha: float = 16
    dropout: float = 0.05
    parts: tuple[str, ...] = ("language_model", "projector")
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the values; :class:`UserError`."""
        if self.r < 1:
            raise UserError(f"model.lora.r: {self.r} is below 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"model.lora.alpha: {self.alpha} is not positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout: {self.dropout} is not within [0, 1)")
        _check_parts("model.lora.parts", self.parts)
        if not self.parts:
            raise UserError("model.lora.parts: names no part; use model/lora=none to train without adapter")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LoraSettings:
        """Read the ``model.lora`` mapping; :class:`UserError` for unknown or impossible values."""
        check_keys("model.lora", values, [field.name for field in fields(LoraSettings)])
        lists = {
            key: None if values[key] is None else tuple(values[key]) for key in ("parts", "modules") if key in values
        }
        return LoraSettings(**{**values, **lists})


def prepare(model: HybridVLA, settings: Mapping[str, Any]) -> None:
    """Make a model ready for training as the ``model`` group says; absent settings change nothing.

    An adapter that the checkpoint has is merged first: training starts from what it learned.

    Args:
        model: changed in place.
        settings: ``quantize`` (None, "8bit", "4bit"), ``lora`` (a mapping or None), ``freeze`` (names of :data:`PARTS`
            that keep their weights), ``checkpoint`` (the adapter's base), ``seed`` (of the adapter's first values).

    Raises:
        UserError: unknown names, or a part is both frozen and adapted.
    """
    frozen = tuple(settings.get("freeze") or ())
    _check_parts("model.freeze", frozen)
    lora = LoraSettings.from_dict(settings["lora"]) if settings.get("lora") else None
    if lora is not None and set(frozen) & set(lora.parts):
        both = ", ".join(sorted(set(frozen) & set(lora.parts)))
        raise UserError(
            f"model.lora.parts: {both} is named in model.freeze too; LoRA holds the weights of all parts still by "
            "itself, so leave out model.freeze, or leave the part out of model.lora.parts"
        )
    if has_adapter(model):
        merge(model)
    if settings.get("quantize"):
        quantization.quantize(model, settings["quantize"])
    if lora is not None:
        attach(model, asdict(lora), base=settings.get("checkpoint"), seed=int(settings.get("seed") or 0))
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)


def attach(model: HybridVLA, settings: Mapping[str, Any], *, base: str | None = None, seed: int = 0) -> None:
    """Add an adapter that changes nothing yet; from then on, only it is trained.

    Args:
        model: changed in place.
        settings: see :class:`LoraSettings`.
        base: name of the checkpoint the model was read from, for the adapter's file.
        seed: of the factors' first values.

    Raises:
        UserError: impossible settings, or no layer matches.
    """
    from peft import LoraConfig

    lora = LoraSettings.from_dict(settings)
    targets = [name for name, module in model.named_modules() if _is_target(name, module, lora)]
    if not targets:
        raise UserError(f"model.lora.modules: {lora.modules} names no layer of {', '.join(lora.parts)}")
    whole = [WHOLE] if model.slot_embedding is not None and part_of(WHOLE) in lora.parts else None
    alpha: Any = lora.alpha
    config = LoraConfig(
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=targets,
        modules_to_save=whole,
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, config)


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has an adapter that is not merged."""
    return "peft_config" in vars(model)


def base_of(model: nn.Module) -> str | None:
    """Name of the checkpoint that the model's adapter belongs to."""
    name: str | None = _config(model).base_model_name_or_path
    return name


def save(model: HybridVLA, folder: Path, base: str | None = None) -> None:
    """Write the adapter into an existing folder, in peft's format.

    Args:
        model: with an adapter.
        folder: gets adapter_config.json and adapter_model.safetensors.
        base: name of the checkpoint without the adapter; None for the one given when it was attached.
    """
    save_config(model, folder, base)
    save_weights(model, folder)


def save_config(model: HybridVLA, folder: Path, base: str | None = None) -> None:
    """Write what the adapter is; see :func:`save`."""
    values = {**_config(model).to_dict(), "inference_mode": True}
    values["base_model_name_or_path"] = base or base_of(model)
    values["target_modules"] = sorted(values["target_modules"])
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def save_weights(model: HybridVLA, folder: Path) -> None:
    """Write what the adapter has learned; see :func:`save`."""
    from safetensors.torch import save_file

    save_file(in_file(dict(model.named_parameters())), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def in_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, as they and their names are in peft's files; those of its base are left out."""
    found = {_file_name(name): weight for name, weight in tensors.items() if is_adapter(name)}
    return {name: weight.detach().cpu().contiguous() for name, weight in found.items()}


def load(model: HybridVLA, folder: Path, trainable: bool = False) -> None:
    """Add the adapter of a folder to its base model.

    Args:
        model: the base, without an adapter; changed in place.
        folder: as written by :func:`save`.
        trainable: whether its weights shall be trained on.

    Raises:
        UserError: files are missing or damaged, it is not a plain LoRA adapter, or it belongs to another model.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from dtvla.policy.weights import module_name

    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"adapter {folder}: no {', '.join(missing)}; copy the whole folder")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = {
            PREFIX + module_name(name.removeprefix(PREFIX)): weight
            for name, weight in load_file(folder / WEIGHTS_FILE).items()
        }
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"adapter {folder}: damaged ({error}); copy it again") from None
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none":
        raise UserError(f"adapter {folder}: only plain LoRA without biases can be read")
    if not isinstance(config.target_modules, str):  # the published code writes whole names, of transformers 4.48
        config.target_modules = [module_name(f"{name}.")[:-1] for name in config.target_modules or ()]
    try:
        _inject(model, config)
    except ValueError as error:  # peft found none of the layers
        raise UserError(f"adapter {folder}: does not fit its base model ({error}); name the right base") from None
    weights = _weights(model)
    wrong = sorted(set(weights) ^ set(tensors)) or [n for n in weights if weights[n].shape != tensors[n].shape]
    if wrong:
        raise UserError(f"adapter {folder}: does not fit its base model (such as {wrong[0]}); name the right base")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
            weight.requires_grad_(trainable)


@torch.no_grad()
def merge(model: HybridVLA) -> None:
    """Add the adapter to the weights and remove it: the products of factors are formed and added in float32 at least.

    When the embedding or the output layer is adapted, the model has two separate ones afterwards, and its
    configuration says so. All weights can be trained again.

    Raises:
        UserError: the weights are quantised: they would have to be rounded again.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    bits = quantization.bits_of(model)
    if bits:
        raise UserError(f"model.quantize: an adapter can't be merged into {bits} weights; read its base unquantised")
    ends = (model.model.language_model.embed_tokens, model.lm_head)
    if any(isinstance(end, LoraLayer) for end in ends):
        _untie(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module.get_base_layer()
            layer.weight.copy_(_wide(layer.weight) + _product(module))
            model.set_submodule(name, layer)
        elif isinstance(module, ModulesToSaveWrapper):
            kept: Any = module.modules_to_save[NAME]
            model.set_submodule(name, kept.to(module.original_module.weight.dtype))
    del model.peft_config
    model.requires_grad_(True)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Compute with the base model alone while the context is open, such as for a frozen reference.

    What peft and transformers offer for this forgets fully trained layers, or makes frozen adapters trainable.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def linear_rows(layer: Any, x: Tensor, first: int, last: int) -> Tensor:
    """Outputs ``first`` to ``last`` of a linear layer without bias and its adapter; the others are not computed."""
    rows = slice(first, last + 1)
    result = nn.functional.linear(x, layer.weight[rows])
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return result
    down, up = layer.lora_A[NAME], layer.lora_B[NAME]
    inner = down(layer.lora_dropout[NAME](x.to(down.weight.dtype)))
    delta = nn.functional.linear(inner, up.weight[rows]) * layer.scaling[NAME]
    return (result + delta).to(result.dtype)


def part_of(parameter_name: str) -> str:
    """Return which of :data:`PARTS` a parameter of the model belongs to (embeddings and head: language model)."""
    if "vision_tower" in parameter_name:
        return "vision_tower"
    if "multi_modal_projector" in parameter_name:
        return "projector"
    return "language_model"


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of an adapted model belongs to its adapter."""
    return ".lora_" in parameter_name or ".modules_to_save." in parameter_name


def _inject(model: HybridVLA, config: LoraConfig) -> None:
    from peft import inject_adapter_in_model

    if has_adapter(model):
        raise ValueError("the model has an adapter already")
    with warnings.catch_warnings():  # of the tied embedding, see the module's first lines
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        if is_adapter(name):  # peft gives them the base's type, in which small steps would be rounded away
            parameter.data = _wide(parameter.data)


def _is_target(name: str, module: nn.Module, lora: LoraSettings) -> bool:
    if not isinstance(module, (nn.Linear, nn.Embedding)) or name == WHOLE or part_of(name) not in lora.parts:
        return False
    return lora.modules is None or name.rsplit(".", 1)[-1] in lora.modules


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names of peft's files."""
    return {_file_name(name): weight for name, weight in model.named_parameters() if is_adapter(name)}


def _file_name(name: str) -> str:
    return PREFIX + name.replace(".modules_to_save", "").replace(f".{NAME}", "")


def _product(layer: Any) -> Tensor:
    """What an adapted layer adds to its weight, float32 at least, of the weight's shape."""
    if NAME in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
    else:
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    product = _wide(up) @ _wide(down) * layer.scaling[NAME]
    return product.T if NAME in layer.lora_embedding_A else product


def _untie(model: HybridVLA) -> None:
    """Give the output layer a weight of its own when it is the embedding's."""
    head, embedding = _base(model.lm_head), _base(model.model.language_model.embed_tokens)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    text: Any = model.config.text_config
    model.config.tie_word_embeddings = text.tie_word_embeddings = False


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _config(model: Any) -> LoraConfig:
    if not has_adapter(model):
        raise ValueError("the model has no adapter")
    config: LoraConfig = model.peft_config[NAME]
    return config


def _check_parts(setting: str, parts: tuple[str, ...]) -> None:
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UserError(f"{setting}: {', '.join(unknown)} is unknown; use {', '.join(PARTS)}")
