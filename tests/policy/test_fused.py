"""Few tokens in one compiled function: the same numbers as layer by layer."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import server
from transformers import GemmaConfig, GemmaModel

from dtvla.policy import adapters, fused
from dtvla.policy.gemma import decoder_layer
from dtvla.policy.policy import Policy

ROWS, COLUMNS = 5, 40


def random_model(dtype: torch.dtype, key_heads: int, generator: torch.Generator) -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": key_heads, "head_dim": 6, "intermediate_size": 22}
    model = GemmaModel(GemmaConfig(hidden_size=10, num_hidden_layers=3, vocab_size=11, **sizes)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def by_layers(model: Any, x_ND: torch.Tensor, rotation: Any, cache: Any, columns: Any, limits: Any) -> torch.Tensor:
    """The layers one after the other, as the engine runs them for many tokens."""
    rows, new = columns.shape
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    seen = torch.arange(COLUMNS) < limits.expand_as(columns)[..., None]
    bias = torch.zeros(seen.shape, dtype=x_ND.dtype).masked_fill(~seen, -torch.inf)
    place = (columns + torch.arange(rows)[:, None] * COLUMNS).flatten()
    for layer, own in zip(model.layers, zip(cache[0].unbind(0), cache[1].unbind(0), strict=True), strict=True):
        repeated = bias.repeat_interleave(group, dim=1)[:, None]
        x_ND = decoder_layer(layer, x_ND, rotation, own, place, repeated, rows, COLUMNS)
    return x_ND


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_compiled_layers_compute_what_the_layers_compute(dtype: torch.dtype, close: float, key_heads: int) -> None:
    """Random weights, cache, columns and limits; several tokens per row; keys and values are written alike."""
    generator = torch.Generator().manual_seed(key_heads)
    for rows, new, causal in ((1, 1, True), (3, 1, True), (2, 3, True), (2, 2, False), (ROWS, 3, True)):
        model = random_model(dtype, key_heads, generator)
        assert fused.can_fuse(model)
        cache = [torch.randn(3, ROWS, COLUMNS, key_heads, 6, generator=generator).to(dtype) for _ in range(2)]
        start = torch.randint(0, COLUMNS - new, (rows, 1), generator=generator)
        columns = start + torch.arange(new)
        limits = columns + 1 if causal else start + new
        angle = torch.randn(rows, new, 1, 6, generator=generator)
        rotation = (angle.cos().to(dtype), angle.sin().to(dtype))
        x_ND = torch.randn(rows * new, 10, generator=generator).to(dtype)
        exact = [part.double() for part in cache]
        expected = by_layers(model.double(), x_ND.double(), [r.double() for r in rotation], exact, columns, limits)
        found = fused.Fused(model.to(dtype))(x_ND, rotation, (cache[0], cache[1]), columns, limits)
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= close * expected.abs().max()
        for own, other in zip(cache, exact, strict=True):
            assert (own - other).abs().max() <= close * other.abs().max()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_a_product_with_rows_of_a_weight(dtype: torch.dtype, close: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((1,), (3,), (2, 2), (2, 3)):
        weight = torch.randn(50, 14, generator=generator).to(dtype)[7:44]
        x = torch.randn(*shape, 14, generator=generator).to(dtype)
        expected = x.double() @ weight.double().T
        found = fused.product(x, weight)
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        assert (found - expected).abs().max() <= close * expected.abs().max()


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """A product with one is the number itself, so ties between two neighbours show."""
    bits = torch.arange(0x3F7F0000, 0x3F820000, 0x1000, dtype=torch.int32)
    numbers = bits.view(torch.float32)
    rounded = torch.tensor([fused._round(n, torch.empty(0, dtype=torch.uint16).numpy()) for n in numbers.numpy()])
    assert torch.equal(rounded, numbers.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_visible(dtype: torch.dtype) -> None:
    weight, x = torch.eye(4, dtype=dtype), torch.tensor([1.0, torch.nan, torch.inf, -1.0], dtype=dtype)
    assert fused.product(x, weight).isnan().all()
    assert torch.equal(fused.product(x[[0, 3, 0, 3]], weight), x[[0, 3, 0, 3]])


def _multiply(threads: int) -> None:
    torch.set_num_threads(threads)
    fused.product(torch.randn(1, 6), torch.randn(8, 6))
    assert torch.get_num_threads() == threads, torch.get_num_threads()


@pytest.mark.parametrize("threads", [1, 3])
def test_torch_keeps_its_number_of_threads(threads: int) -> None:
    """Numba and torch share OpenMP's settings; in a process where Numba has not started its threads."""
    process = server().Process(target=_multiply, args=(threads,))
    process.start()
    process.join(200)
    assert process.exitcode == 0


LAYERS = """
import sys
import torch
from transformers.models.gemma import GemmaConfig, GemmaModel
from dtvla.policy import fused
torch.manual_seed(0)
torch.set_num_threads(1)
sizes = dict(vocab_size=8, hidden_size=128, num_hidden_layers=4, intermediate_size=512)
heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=32)
language = GemmaModel(GemmaConfig(**sizes, **heads, attn_implementation="eager")).eval()
x, rotation = torch.randn(1, 128), (torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32))
cache = torch.randn(4, 1, 64, 1, 32), torch.randn(4, 1, 64, 1, 32)
hidden = fused.Fused(language)(x, rotation, cache, torch.tensor([[40]]), torch.tensor([[41]]))
sys.stdout.buffer.write(b"".join(part.detach().numpy().tobytes() for part in (hidden, *cache)))
"""


@pytest.mark.slow
def test_the_process_that_compiles_calculates_as_those_that_read_its_code(tmp_path: Path) -> None:
    """Bit for bit: a run interrupted on a fresh machine goes on with the code that its first process compiled."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", LAYERS]
    compiled, read = (subprocess.run(command, check=True, env=environment, capture_output=True).stdout for _ in "ab")
    assert list(tmp_path.rglob("*.nbi")), "the code is kept"
    assert len(compiled) == 4 * (128 + 2 * 4 * 64 * 32)
    assert (np.frombuffer(compiled, np.float32) == np.frombuffer(read, np.float32)).all()


def test_what_the_compiled_code_does_not_know_is_left_to_the_layers(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    language: Any = policy.model.model.language_model
    assert fused.can_fuse(language)
    assert not fused.can_fuse(language.half())
    language.double()
    language.layers[0].mlp.act_fn = torch.nn.SiLU()
    assert not fused.can_fuse(language)
    adapted = make_policy()
    adapters.attach(adapted.model, {"r": 2})
    language = adapted.model.model.language_model
    assert not fused.can_fuse(language)
    adapters.merge(adapted.model)
    assert fused.can_fuse(language)
