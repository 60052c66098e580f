"""Ways to run the engine: each gives the eager result, and impossible ones are named."""

from collections.abc import Callable, Hashable

import numpy as np
import pytest
import torch

from dtvla.errors import UserError
from dtvla.policy.decoding import Engine
from dtvla.policy.policy import Policy

from .conftest import random_observation, sentence

pytestmark = pytest.mark.usefixtures("exact_norms")


class Replayed:
    """Stands for CUDA graphs on the CPU: fixed places for inputs, one function per key, results copied out."""

    def __init__(self) -> None:
        self.known: dict[Hashable, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {}

    def clear(self) -> None:
        self.known.clear()

    def run(self, key: Hashable, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        if key not in self.known:
            self.known[key] = (function, [tensor.clone() for tensor in inputs])
        captured, places = self.known[key]
        for place, tensor in zip(places, inputs, strict=True):
            assert place.shape == tensor.shape
            place.copy_(tensor)
        return captured(*places).clone()


def decide(policy: Policy, engine: Engine, rows: int, seed: int) -> list[object]:
    rng = np.random.default_rng(seed)
    layout = policy.processor.layout
    pixels = torch.stack([policy.processor.pixels(random_observation(policy, rng)) for _ in range(rows)])
    context = engine.read(pixels, [layout.prompt(sentence(rng, 1, 9)) for _ in range(rows)])
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]
    sampled = engine.think(context, max_tokens=7, temperature=1.0, generators=generators)
    engine.rewind(context)
    drafts = [t.ids[: 2 * row] for row, t in enumerate(sampled)]
    greedy = engine.think(context, max_tokens=9, drafts=drafts, block=4)
    first = engine.act(context)
    engine.rewind(context)
    engine.feed(context, [layout.thought(sentence(rng)) for _ in range(rows)])
    second = engine.act(context, temperature=1.3, generators=generators)
    ids = [t.ids for t in (*sampled, *greedy)]
    return [
        ids,
        first.bins_BA.tolist(),
        second.bins_BA.tolist(),
        second.log_probs_BA.double().numpy().round(5).tolist(),
    ]


@pytest.mark.parametrize("decoder", ["hybrid", "autoregressive"])
def test_padded_shapes_of_captured_code_change_nothing(
    make_policy: Callable[..., Policy], decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches padded to powers of two, blocks and columns to steps, with inputs in fixed places."""
    policy = make_policy(decoder=decoder, slot_embedding=decoder == "hybrid")
    engine = Engine(policy.model, policy.processor.layout)
    runtime = engine.runtime
    runtime.refresh()
    runtime.mode, runtime._graphs = "graph", Replayed()  # type: ignore[assignment]
    for seed, rows in enumerate((3, 1, 5, 3)):
        assert decide(policy, engine, rows, seed) == decide(policy, policy.engine, rows, seed)
    assert len(runtime._graphs.known) > 4  # type: ignore[attr-defined]


@pytest.mark.slow
def test_layers_compile_without_a_break_and_compute_the_same(policy: Policy) -> None:
    """``fullgraph=True`` raises at the first break; all layers share one compilation per shape."""
    rng = np.random.default_rng(0)
    layout = policy.processor.layout
    prompt, pixels = layout.prompt(sentence(rng)), policy.processor.pixels(random_observation(policy, rng))[None]
    torch._dynamo.utils.counters.clear()
    results = []
    for engine in (Engine(policy.model, layout, "compile"), policy.engine):
        context = engine.read(pixels, [prompt])
        results.append((engine.think(context, max_tokens=6), engine.action_logits(context)))
    (thoughts, logits), (expected, expected_logits) = results
    assert [t.ids for t in thoughts] == [t.ids for t in expected]
    assert (logits - expected_logits).abs().max() < 1e-9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # prompt, token and action block


def test_a_graph_without_a_gpu_and_unknown_engines_are_named(policy: Policy) -> None:
    with pytest.raises(UserError, match="did you mean|use one of auto"):
        Engine(policy.model, policy.processor.layout, "fast")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        rng = np.random.default_rng(0)
        pixels = policy.processor.pixels(random_observation(policy, rng))[None]
        with pytest.raises(UserError, match="graph needs a GPU"):
            Engine(policy.model, policy.processor.layout, "graph").read(pixels, [policy.processor.layout.prompt("go")])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decoder", ["hybrid", "autoregressive"])
def test_cuda_graphs_compute_what_eager_code_computes(make_policy: Callable[..., Policy], decoder: str) -> None:
    policy = make_policy(decoder=decoder, slot_embedding=decoder == "hybrid")
    policy.model.cuda()
    eager = Engine(policy.model, policy.processor.layout, "eager")
    graph = Engine(policy.model, policy.processor.layout)
    for seed, rows in enumerate((3, 1, 5, 3)):
        assert decide(policy, graph, rows, seed) == decide(policy, eager, rows, seed)
    assert graph.runtime.mode == "graph"
