"""The policy against the published code, on the same tiny float64 checkpoint, pictures, texts and actions.

``published/answers.npz`` holds what the published classes answer (see ``tools/published_oracle.py``, which writes it).
Here the recipe's checkpoint is written to disk in the published format and opened as any user's would be. Both sides
compute in float64 throughout: Gemma's norm and rotary table, which transformers keeps in float32, are patched.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gemma import modeling_gemma

from dtvla.policy import compat
from dtvla.policy.attention import Rule, Segment, visible
from dtvla.policy.compat import Compat
from dtvla.policy.cot import CotMode
from dtvla.policy.decoding import Engine
from dtvla.policy.layout import Batch, Example
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import supervised_positions
from dtvla.policy.policy import Policy
from dtvla.policy.weights import module_name

from .conftest import make_batch
from .published import recipe

EXACT = 1e-9
SAMPLES = range(len(recipe.THOUGHTS))


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    """What the published code says."""
    with np.load(Path(recipe.__file__).with_name("answers.npz"), allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module", autouse=True)
def _float64_throughout() -> Iterator[None]:
    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
        angle = position_ids[..., None].double() * self.config.rope_parameters["rope_theta"] ** -half
        return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gemma.GemmaRMSNorm, "forward", norm)
        patch.setattr(modeling_gemma.GemmaRotaryEmbedding, "forward", rotary)
        yield


@pytest.fixture(scope="module")
def policy(answers: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("published") / "checkpoint"
    shapes = {
        str(name): shape[shape >= 0].tolist() for name, shape in zip(answers["names"], answers["shapes"], strict=True)
    }
    recipe.write_checkpoint(folder, shapes)
    return Policy.load(folder, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _default_behaviour(policy: Policy) -> Iterator[None]:
    yield
    compat.apply(policy, Compat(action_decode="fixed"))


def sample(policy: Policy, index: int) -> tuple[Example, torch.Tensor, torch.Tensor]:
    """The recipe's training sample, made the way the data module makes it."""
    actions_SD = torch.from_numpy(policy.processor.normalizer.normalize(recipe.actions(index)))
    thought = recipe.THOUGHTS[index].removeprefix("<think>").removesuffix("</think>")
    example = policy.processor.layout.encode(recipe.TASKS[index], thought or None, actions_SD)
    return example, pixels(policy, index), actions_SD


def observation(policy: Policy, index: int) -> dict[str, Any]:
    cameras = policy.processor.images.cameras
    pictures = dict(zip(cameras, recipe.pictures(index), strict=True))
    return {**pictures, "instruction": recipe.TASKS[index % len(recipe.TASKS)]}


def pixels(policy: Policy, index: int) -> torch.Tensor:
    return policy.processor.pixels(observation(policy, index))


def batch_of(policy: Policy, key: int | str) -> Batch:
    """One sample, or the padded batch."""
    indices = recipe.BATCH if key == "batch" else [int(key)]
    return make_batch(policy, [sample(policy, index) for index in indices])


def differences(answers: dict[str, np.ndarray], key: int | str, logits_MV: torch.Tensor) -> dict[str, float]:
    """Largest differences from the published logits."""
    ours = recipe.summary(logits_MV.detach(), recipe.token_columns())
    assert (ours.pop("argmax") == answers[f"argmax_{key}"]).all()
    return {name: float(np.abs(value - answers[f"{name}_{key}"]).max()) for name, value in ours.items()}


@pytest.mark.parametrize("key", [*SAMPLES, "batch"])
def test_sequences_and_labels_are_the_published_data_sets(
    policy: Policy, answers: dict[str, np.ndarray], key: int | str
) -> None:
    """Prompt wording, newline, tags, thoughts, action ids after normalisation, and padding."""
    batch = batch_of(policy, key)
    assert torch.equal(batch.input_ids_BT, torch.from_numpy(answers[f"input_ids_{key}"]))
    assert torch.equal(batch.labels_BT, torch.from_numpy(answers[f"labels_{key}"]))
    learned = (batch.segment_BT == Segment.THINK) | (batch.segment_BT == Segment.ACT)
    assert torch.equal(learned.long(), torch.from_numpy(answers[f"token_type_ids_{key}"]))


@pytest.mark.parametrize("key", [*SAMPLES, "batch"])
def test_masks_are_the_published_ones(policy: Policy, answers: dict[str, np.ndarray], key: int | str) -> None:
    segment_BT = batch_of(policy, key).segment_BT
    shape = (*segment_BT.shape, segment_BT.shape[1])
    published = np.unpackbits(answers[f"mask_{key}"], count=np.prod(shape)).reshape(shape).astype(bool)
    leaking = visible(segment_BT, rule=Rule(pads_visible=True))
    assert torch.equal(leaking, torch.from_numpy(published))
    pad_BT = segment_BT == Segment.PAD
    clean = torch.from_numpy(published) & ~pad_BT[:, None] & ~pad_BT[:, :, None]
    assert torch.equal(visible(segment_BT) & ~pad_BT[:, :, None], clean)


@pytest.mark.parametrize("key", SAMPLES)
def test_logits_loss_and_gradient_of_unpadded_sequences(
    policy: Policy, answers: dict[str, np.ndarray], key: int
) -> None:
    check_step(policy, answers, key, batch_of(policy, key))


def test_compat_pads_visible_reproduces_the_published_padded_batch(
    policy: Policy, answers: dict[str, np.ndarray]
) -> None:
    batch = batch_of(policy, "batch")
    compat.apply(policy, Compat(pads_visible=True))
    check_step(policy, answers, "batch", batch)


def check_step(policy: Policy, answers: dict[str, np.ndarray], key: int | str, batch: Batch) -> None:
    """Logits, loss and gradient of one training step."""
    outputs: list[torch.Tensor] = []
    hook = policy.model.lm_head.register_forward_hook(lambda *call: outputs.append(call[-1]))
    loss = sft_loss(policy.model, batch, policy.processor.layout.bins).mean
    hook.remove()
    policy.model.zero_grad()
    loss.backward()
    found = differences(answers, key, outputs[0])
    found["loss"] = abs(loss.item() - float(answers[f"loss_{key}"]))
    assert max(found.values()) < EXACT, found
    gradients = {name: p.grad for name, p in policy.model.named_parameters()}
    theirs = answers[f"gradient_{key}"]
    ours = recipe.projections({str(name): gradients[module_name(str(name))] for name in answers["names"]})
    assert (np.abs(ours - theirs) <= EXACT * np.maximum(theirs[:, :1], 1)).all()  # of each gradient's norm


def test_padding_changes_nothing_by_default(policy: Policy, answers: dict[str, np.ndarray]) -> None:
    """Rows of the padded batch equal the published unpadded answers, and differ from its padded ones."""
    batch = batch_of(policy, "batch")
    rows = supervised_positions(batch).sum(1).tolist()
    with torch.no_grad():
        logits_MV = policy.model(batch)
    for index, own in zip(recipe.BATCH, logits_MV.split(rows), strict=True):
        found = differences(answers, index, own)
        assert max(found.values()) < EXACT, found
    leak_M = np.abs(logits_MV[:, recipe.token_columns()].numpy() - answers["columns_batch"]).max(1)
    shorter, longest = np.split(leak_M, [rows[0]])
    assert shorter.min() > 1e-3
    assert longest.max() < EXACT


@pytest.mark.parametrize("kind", ["ended", "capped"])
def test_thoughts_and_chosen_bins_are_the_published_ones(
    policy: Policy, answers: dict[str, np.ndarray], kind: str
) -> None:
    """Token for token; a thought that reaches the cap is closed, which the published code leaves out."""
    layout, engine = policy.processor.layout, Engine(policy.model, policy.processor.layout)
    indices = answers[kind].tolist()
    prompts = [layout.prompt(recipe.TASKS[index % len(recipe.TASKS)]) for index in indices]
    assert prompts == [answers[f"prompt_{index}"].tolist() for index in indices]
    context = engine.read(torch.stack([pixels(policy, index) for index in indices]), prompts)
    thoughts = engine.think(context, max_tokens=recipe.CAP)
    logits_BAK, bins_BA = engine.action_logits(context), engine.act(context).bins_BA
    for row, index in enumerate(indices):
        published = answers[f"thought_{index}"].tolist()
        assert thoughts[row].ids[: len(published)] == published
        assert len(published) > 10
        assert thoughts[row].truncated == (kind == "capped")
        check_actions(answers, f"acted_{index}", logits_BAK[row])
        assert bins_BA[row].tolist() == answers[f"acted_{index}_argmax"].tolist()


def test_actions_after_an_empty_thought_are_the_published_ones(policy: Policy, answers: dict[str, np.ndarray]) -> None:
    layout, engine = policy.processor.layout, Engine(policy.model, policy.processor.layout)
    context = engine.read(pixels(policy, 100)[None], [layout.prompt(recipe.TASKS[0])])
    engine.feed(context, [layout.thought(None)])
    check_actions(answers, "acted_without", engine.action_logits(context)[0])


def check_actions(answers: dict[str, np.ndarray], name: str, logits_AK: torch.Tensor) -> None:
    """Logits of the action bins."""
    for key, value in recipe.summary(logits_AK, recipe.bin_columns()).items():
        assert np.abs(value - answers[f"{name}_{key}"]).max() < EXACT, key


@pytest.mark.parametrize("mode", ["published", "fixed"])
def test_decisions_give_the_published_robot_actions(policy: Policy, answers: dict[str, np.ndarray], mode: str) -> None:
    """With the published decoding all numbers are the published ones; the default is one bin lower."""
    compat.apply(policy, Compat(action_decode=mode))  # type: ignore[arg-type]
    width, unnormalize = policy.processor.layout.bins.width, policy.processor.normalizer.unnormalize
    one_bin_D = unnormalize(np.full(recipe.ACTION_DIM, width)) - unnormalize(np.zeros(recipe.ACTION_DIM))
    for index in answers["ended"].tolist():
        decision = policy.act([observation(policy, index)], CotMode(max_tokens=recipe.CAP))[0]
        assert decision.thought_ids == answers[f"thought_{index}"].tolist()
        bins_SD = answers[f"acted_{index}_argmax"].reshape(recipe.CHUNK, recipe.ACTION_DIM)
        inner_SD = (bins_SD > 0) & (bins_SD < len(recipe.BAND) - 1)  # both ends are clamped
        expected_SD = answers[f"robot_{index}"] - (mode == "fixed") * inner_SD * one_bin_D
        assert np.abs(decision.actions_SD - expected_SD).max() < 1e-6  # float32


def test_action_ids_and_values_are_the_published_table(policy: Policy, answers: dict[str, np.ndarray]) -> None:
    layout = policy.processor.layout
    values = torch.from_numpy(recipe.action_grid())
    assert layout.bins.encode(values).tolist() == answers["grid_ids"].tolist()
    ids = torch.arange(recipe.BAND[0] - 3, recipe.BAND[-1] + 4)
    published = layout.vocabulary.bins("published").decode(ids)
    assert np.abs(published.numpy() - answers["band_values"]).max() < 1e-6


def test_published_decoding_is_one_bin_high_and_the_default_is_unbiased(policy: Policy) -> None:
    bins = policy.processor.layout.bins
    values = torch.from_numpy(recipe.action_grid())
    values = values[values.abs() < 1 - bins.width]
    for mode, bias in (("published", 1.0), ("fixed", 0.0)):
        other = policy.processor.layout.vocabulary.bins(mode)  # type: ignore[arg-type]
        error = (other.decode(other.encode(values)) - values) / bins.width
        assert error.mean().item() == pytest.approx(bias, abs=0.02)
        assert (error - bias).abs().max() < 0.51


def test_the_compared_decisions_use_the_whole_range_of_actions(answers: dict[str, np.ndarray]) -> None:
    bins = np.concatenate([answers[f"acted_{i}_argmax"] for kind in ("ended", "capped") for i in answers[kind]])
    assert np.histogram(bins, bins=16, range=(0, len(recipe.BAND)))[0].min() > 0
    assert len(np.unique(bins)) > 100
