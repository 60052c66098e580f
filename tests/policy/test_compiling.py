"""Compiled layers learn what the others learn, under the same names, and leave decisions as they are."""

import copy
from collections.abc import Iterator

import pytest
import torch

from dtvla.benchmarks.training import Settings, Subject, plain_loss
from dtvla.policy.compiling import compile_layers, is_compiled
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import HybridVLA
from policy.conftest import SETTINGS

MODEL = SETTINGS | {"image_size": 16, "compile": False}


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    """Workers that compile take longer to start than a tiny model's code to compile."""
    with torch._inductor.config.patch(compile_threads=1):  # type: ignore[attr-defined]
        yield


def subject(rows: int, lengths: tuple[int, int]) -> Subject:
    chosen = Settings(model=MODEL, device="cpu", micro_batch=rows, passes=1, thought_lengths=lengths)
    return Subject(chosen, ("ours",))


def gradients(model: HybridVLA, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True))


@pytest.mark.slow
def test_compiled_layers_have_the_plain_gradient_for_every_length() -> None:
    """Two shapes of batches, one code; with checkpointing around the second. The other side has all logits."""
    for rows, lengths, stance in ((3, (4, 9), "default"), (5, (12, 15), "fail_on_recompile")):
        given = subject(rows, lengths)
        plain = given.models["ours"]
        compiled = copy.deepcopy(plain)
        if rows == 5:
            compiled.gradient_checkpointing_enable({"use_reentrant": False})
        compile_layers(compiled)
        with torch.compiler.set_stance(stance):
            ours = gradients(compiled, sft_loss(compiled, given.passes["ours"][0], given.layout.bins).mean)
        theirs = gradients(plain, plain_loss(plain, given.passes["ours"][0]))
        scale = max(float(gradient.abs().max()) for gradient in theirs.values())
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_names_and_copies_stay_and_nothing_is_compiled_without_gradients() -> None:
    """A copy (of an average, say) is on its own weights; decisions and validation wait for no compiler."""
    given = subject(2, (4, 9))
    model = given.models["ours"]
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(given.passes["ours"][0])
    compile_layers(model)
    compile_layers(model)
    layers = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    assert all(is_compiled(layer) for layer in layers)
    assert {type(layer).__name__ for layer in layers} == {"LanguageLayer", "SiglipEncoderLayer"}
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(model(given.passes["ours"][0]), before, rtol=0, atol=0)
        for weight in twin.parameters():
            weight.zero_()
        assert not twin(given.passes["ours"][0]).any()
        torch.testing.assert_close(model(given.passes["ours"][0]), before, rtol=0, atol=0)
