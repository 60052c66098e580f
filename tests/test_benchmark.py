"""The benchmark: both sides decide alike, every number can be recomputed, and a wrong setting is one clear message."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.conftest import SETTINGS

from dtvla.benchmarks.floor import Rates, Workload
from dtvla.benchmarks.record import run, settings_of, write
from dtvla.benchmarks.settings import Settings
from dtvla.benchmarks.studies import TARGETS, latency, throughput
from dtvla.benchmarks.subject import Subject, spoil
from dtvla.benchmarks.tables import tables
from dtvla.benchmarks.timing import Timing, interleave
from dtvla.errors import UserError

THOUGHT, NUMBERS = 12, (3, 5)
MODEL: dict[str, Any] = SETTINGS | {
    "name": "tiny",
    "image_size": 32,
    "max_prompt_tokens": 64,
    "tokenizer_size": 500,
    "vocabulary_size": None,
    "vision": SETTINGS["vision"] | {"patch_size": 16},
}
EQUAL_BINS = {"equal_bins": 1.0, "farthest_bins": 0.0}
EQUAL = EQUAL_BINS | {"equal_thoughts": 1.0}
VALUES: dict[str, Any] = {
    "model": MODEL,
    "device": "cpu",
    "seed": 3,
    "thought_tokens": THOUGHT,
    "action_tokens": list(NUMBERS),
    "draft_accuracy": 0.8,
    "batch_size": 2,
    "batch_sizes": [1, 3],
    "repeats": 3,
    "warmup": 1,
}


def settings(**changes: Any) -> Settings:
    return settings_of("latency", VALUES | changes)


@pytest.fixture(scope="module", autouse=True)
def _small_probes(one_thread: None) -> Iterator[None]:
    """The device is measured on a small buffer: the rates are rough, their use is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dtvla.benchmarks.floor.READ_BYTES", {"cpu": 2**22})
        patch.setattr("dtvla.benchmarks.floor.MATRIX_SIDE", {"cpu": 128})
        yield


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A latency study."""
    return latency(settings())


@pytest.fixture(scope="module")
def by_size() -> dict[str, Any]:
    """A throughput study, the published way on single rows only."""
    return throughput(settings(published_limit=1))


def measurement(document: dict[str, Any], side: str, rows: int) -> dict[str, Any]:
    (found,) = (m for m in document["measurements"] if m["side"] == side and m["batch_size"] == rows)
    return dict(found)


def test_both_sides_decide_alike(measured: dict[str, Any], by_size: dict[str, Any]) -> None:
    """Speed is compared between equal outputs: same thoughts, same actions, of full length on both sides."""
    pairs = ["speculate = think", "think = published think", "mask = published mask"]
    pairs += [f"autoregressive {n} = published autoregressive {n}" for n in NUMBERS]
    assert list(measured["agreement"]) == pairs
    assert all(same in (EQUAL, EQUAL_BINS) for same in measured["agreement"].values())
    assert measured["agreement"]["think = published think"] == EQUAL
    for side in ("think", "speculate", "published think"):
        record = measurement(measured, side, 2)
        assert (record["thought_tokens"], record["longest_thought"]) == (2 * THOUGHT, THOUGHT)
    assert by_size["agreement"]["1"] == dict(zip(pairs, (EQUAL, EQUAL, EQUAL_BINS), strict=False))
    assert by_size["agreement"]["3"] == {pairs[0]: EQUAL}


def test_the_published_sides_own_decision_is_not_trivial() -> None:
    """Random weights write more than one word and choose more than one bin, so agreement says something."""
    subject = Subject(settings())
    with torch.inference_mode():
        thoughts, bins_BA = subject.published_think(subject.inputs(2), lambda phase: None)
        bins_BN = subject.published.autoregressive(*vars(subject.inputs(2)).values(), 8, lambda phase: None)
    assert len(set(thoughts[0])) > 3
    assert thoughts[0][-2:] == [subject.layout.vocabulary.think_end_id, subject.layout.vocabulary.action_start_id]
    assert len(bins_BA.unique()) > 3
    assert ((bins_BN >= 0) & (bins_BN < subject.layout.bins.count)).all()


def test_speculation_needs_fewer_forwards(measured: dict[str, Any]) -> None:
    plain, ahead = (measurement(measured, side, 2)["thought_forwards"] for side in ("think", "speculate"))
    assert ahead < plain
    assert plain in (THOUGHT - 1, THOUGHT)


@pytest.mark.parametrize("study", ["measured", "by_size"])
def test_every_ratio_follows_from_the_medians(study: str, request: pytest.FixtureRequest) -> None:
    document = request.getfixturevalue(study)

    def seconds(thing: list[Any]) -> float:
        side, rows, phase = thing
        times = measurement(document, side, rows)["phases"][phase]["seconds"]
        assert len(times) == 3
        return float(sorted(times)[1] / rows)

    for name, ratio in document["ratios"].items():
        under = ratio["floor_s"] / 2 if "floor_s" in ratio else seconds(ratio["under"])
        assert ratio["value"] == pytest.approx(seconds(ratio["over"]) / under), name
    for target in document["targets"]:
        assert target["value"] == document["ratios"][target["ratio"]]["value"]
        assert target["met"] == (target["value"] >= target["at_least"])


def test_the_ratios_that_were_asked_for_are_there(measured: dict[str, Any], by_size: dict[str, Any]) -> None:
    assert {t.ratio for t in TARGETS["cpu"]} == {t["ratio"] for t in measured["targets"]} <= set(measured["ratios"])
    names = {f"mask / {way}autoregressive {n}" for n in NUMBERS for way in ("", "published ")}
    assert names | {"speculate / mask", "think: ours / floor", "think: ours / floor, act"} <= set(measured["ratios"])
    assert "think: decisions/s of batch 3 / batch 1" in by_size["ratios"]
    assert "think: published / ours, batch 1" in by_size["ratios"]
    assert "think: published / ours, batch 3" not in by_size["ratios"]


def test_phases_add_up_to_the_whole(measured: dict[str, Any]) -> None:
    phases = {"think": ["read", "thought", "act"], "published mask": ["act"], "autoregressive 3": ["read", "act"]}
    for side, names in phases.items():
        found = measurement(measured, side, 2)["phases"]
        assert list(found) == [*names, "total"]
        for index, total in enumerate(found["total"]["seconds"]):
            parts = sum(found[name]["seconds"][index] for name in names)
            assert 0 < parts <= total


def test_the_file_is_complete_and_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"repeats": 1, "warmup": 0, "batch_size": 1, "dtype": "bfloat16"}
    first = run("latency", settings(**values), tmp_path, "the command")
    shown = capsys.readouterr().out
    document = json.loads(first.read_text(), parse_constant=pytest.fail)
    assert first.name == "latency-tiny-cpu-bfloat16.json"
    assert (document["format"], document["study"]) == ("dtvla.benchmark", "latency")
    assert document["settings"]["model"] == MODEL
    assert document["provenance"]["command"] == "the command"
    assert document["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert document["provenance"]["machine"]["cores"] >= 1
    assert (document["dtype"], document["threads"]) == ("bfloat16", 1)
    assert document["shapes"]["prompt_tokens"] > document["shapes"]["image_tokens"] == 8
    assert document["shapes"]["vocabulary"] == 500 + 32 + 5
    assert tables(document) in shown
    for words in ("published think", "speculate", "autoregressive 5", "x floor", "verdict", str(first)):
        assert words in shown
    before = first.read_bytes()
    assert write({"a": 1}, tmp_path, first.stem).name == "latency-tiny-cpu-bfloat16-2.json"
    assert first.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{first.stem}-2.json", first.name]


def test_the_floor_counts_what_a_model_reads_and_computes() -> None:
    """Against sums by hand over the modules; with an endless rate of one kind only the other counts."""
    subject = Subject(settings())
    model, layout, prompt = subject.model, subject.layout, len(subject.prompt)
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    work = Workload(model, layout, rows=2, prompt=prompt, thought=THOUGHT)
    read_only = work.floors(Rates(1.0, float("inf")), NUMBERS)
    key_value = 2 * 2 * 1 * 12  # bytes are 4 a number: 2 layers, keys and values, 1 head of 12
    step = sum(4 * (layers + key_value * 2 * (prompt + i) + 537 * 24) for i in range(1, THOUGHT))
    assert read_only["think"]["thought"] == pytest.approx(step + 4 * 537 * 24)
    block, behind = 3 * 7 + 3, prompt + THOUGHT - 1
    assert read_only["think"]["act"] == pytest.approx(4 * (layers + key_value * 2 * (behind + block) + 32 * 24))
    compute = work.floors(Rates(float("inf"), 1.0), NUMBERS)["think"]["act"]
    attention = 4 * 2 * 2 * 12 * block * (behind + block)
    assert compute == pytest.approx(2 * (2 * layers * block + attention + 2 * 32 * 24 * 21))
    assert set(read_only) == {"think", "mask", "autoregressive 3", "autoregressive 5"}
    pictures = work.floors(Rates(float("inf"), 1.0), ())["mask"]["read"]
    tower = sum(
        p.numel() for m in (model.model.vision_tower, model.model.multi_modal_projector) for p in m.parameters()
    )
    vision = 4 * (2 * tower * 4 + 4 * 1 * 16 * 4**2)  # 2 rows x 2 cameras of 4 patches
    assert pictures == pytest.approx(vision + 2 * (2 * layers * prompt + 4 * 2 * 2 * 12 * prompt**2))


def test_fresh_weights_write_text_that_rounding_does_not_change() -> None:
    """At their usual size: no word twice, and bfloat16's thought is the published one, with a draft or without."""
    subject = Subject(settings(model=MODEL | {"initializer_range": 0.02}, thought_tokens=30, dtype="bfloat16"))
    inputs = subject.inputs(2)
    with torch.inference_mode():
        thoughts, _ = subject.think(inputs, lambda phase: None)
        ahead, _ = subject.think(inputs, lambda phase: None, subject.drafts([t.ids for t in thoughts]))
        published, _ = subject.published_think(inputs, lambda phase: None)
    assert [t.ids for t in thoughts] == [t.ids for t in ahead] == published
    assert len(set(published[0])) == 30


def test_a_draft_is_wrong_in_as_many_places_as_it_should_be() -> None:
    subject = Subject(settings())
    words, generator = subject.layout.vocabulary, torch.Generator().manual_seed(1)
    ids = torch.randint(3, words.action_first_id, (98,), generator=generator).tolist()
    ids += [words.think_end_id, words.action_start_id]
    for accuracy, wrong in ((1.0, 0), (0.97, 3), (0.5, 50), (0.0, 98)):
        draft = spoil(ids, accuracy, words, generator)
        assert sum(a != b for a, b in zip(ids, draft, strict=True)) == wrong
        assert draft[-2:] == ids[-2:]
        assert all(i < words.action_first_id for i in draft[:-2])


def test_sides_take_turns_and_phases_are_kept_apart() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        def go(mark: Any) -> None:
            order.append(name)
            mark("half")

        return go

    rounds: list[int] = []
    found = interleave(
        {name: side(name) for name in "abc"},
        repeats=2,
        warmup=1,
        device=torch.device("cpu"),
        on_round=lambda: rounds.append(1),
    )
    assert "".join(order) == "abcbcacab"
    assert len(rounds) == 3
    assert all(len(found[name][phase].seconds) == 2 for name in "abc" for phase in ("half", "total"))
    low, high = Timing([1.0, 2.0, 3.0, 4.0, 5.0]).quartiles
    assert (low, Timing([5.0, 1.0, 3.0]).median, high) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is not a whole number from 1 on"),
        ({"batch_sizes": [1, 0]}, "batch_sizes: 0 is not a whole number from 1 on"),
        ({"batch_sizes": []}, "batch_sizes: is empty"),
        ({"thought_tokens": 2}, "thought_tokens: 2 is not a whole number from 3 on"),
        ({"thought_tokens": 250}, r"thought_tokens: 250 behind a prompt of \d+ tokens.*256 positions; give at most"),
        ({"action_tokens": [300]}, r"action_tokens: 300 behind a prompt of \d+ tokens.*256 positions; give at most"),
        ({"repeats": "many"}, "repeats: 'many' is not a whole number"),
        ({"draft_accuracy": 97}, "draft_accuracy: 97 is no share"),
        ({"dtype": "int4"}, "dtype: 'int4' is unknown"),
        ({"engine": "fast"}, "engine: 'fast' is unknown"),
        ({"device": "tpu9"}, "device: 'tpu9' is unknown"),
        ({"model": MODEL | {"slot_embedding": False, "decoder": "autoregressive"}}, "model.decoder: autoregressive"),
        ({"checkpoint": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Subject(settings(**change))


@pytest.mark.parametrize(("word", "found"), [([], "none was named"), (["latencie"], "'latencie' is unknown")])
def test_the_first_word_names_the_study(word: list[str], found: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dtvla.benchmark", *word, "model=nano"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: benchmark: {found}; begin with one of latency, throughput, rollout, parity, memory, training, grpo, "
        "e.g. dtvla benchmark latency model=small"
    ]
