import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dtvla.data.normalization import ActionNormalizer, Statistics
from dtvla.errors import UserError


def random_frames(seed: int, dims: int, count: int = 500) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(size=dims), rng.uniform(0.1, 3, dims), (count, dims)).astype(np.float32)


@pytest.fixture
def statistics() -> Statistics:
    return Statistics.from_frames(random_frames(0, 8), random_frames(1, 7))


def test_statistics_are_those_of_numpy(statistics: Statistics) -> None:
    actions = random_frames(1, 7).astype(np.float64)
    for name, expected in {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "min": actions.min(0),
        "max": actions.max(0),
        "q01": np.quantile(actions, 0.01, axis=0),
        "q99": np.quantile(actions, 0.99, axis=0),
    }.items():
        np.testing.assert_allclose(statistics.action[name], expected, rtol=1e-12)


def test_json_and_openpis_layout_round_trip_with_equal_digest(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "norm_stats.json"
    statistics.save(path)
    assert Statistics.load(path).digest() == statistics.digest()
    nested = {"norm_stats": {"state": statistics.to_dict()["state"], "actions": statistics.to_dict()["action"]}}
    assert Statistics.from_dict(nested).digest() == statistics.digest()
    changed = statistics.to_dict()
    changed["action"]["q01"][0] += 1e-9
    assert Statistics.from_dict(changed).digest() != statistics.digest()


def test_quantile_formula_and_its_inverse(statistics: Statistics) -> None:
    actions = random_frames(2, 7)
    normalized = ActionNormalizer(statistics).normalize(actions)
    low, high = np.array(statistics.action["q01"]), np.array(statistics.action["q99"])
    expected = np.clip(2 * (actions - low) / (high - low + 1e-8) - 1, -1, 1)
    np.testing.assert_allclose(normalized[:, :6], expected[:, :6], atol=1e-6)
    np.testing.assert_array_equal(normalized[:, 6], actions[:, 6])
    back = ActionNormalizer(statistics).unnormalize(normalized)
    np.testing.assert_allclose(back[:, :6], np.clip(actions, low, high)[:, :6], atol=1e-5)


@pytest.mark.parametrize("method", ["quantile", "min_max", "mean_std"])
def test_tensors_and_arrays_agree_and_dictionaries_round_trip(statistics: Statistics, method: str) -> None:
    normalizer = ActionNormalizer(statistics, method, [True] * 7)  # type: ignore[arg-type]
    again = ActionNormalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    actions = random_frames(3, 7)
    ours = normalizer.normalize(actions)
    np.testing.assert_array_equal(again.normalize(torch.from_numpy(actions)).numpy(), ours)
    np.testing.assert_array_equal(again.unnormalize(torch.from_numpy(ours)).numpy(), normalizer.unnormalize(ours))
    if method == "mean_std":
        np.testing.assert_allclose(normalizer.unnormalize(ours), actions, atol=1e-5)


def test_a_constant_dimension_stays_finite() -> None:
    actions = np.zeros((50, 7), np.float32)
    normalizer = ActionNormalizer(Statistics.from_frames(np.zeros((50, 8)), actions))
    assert np.isfinite(normalizer.normalize(actions)).all()
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(actions)), actions, atol=1e-7)


def test_edited_statistics_missing_fields_and_bad_files_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    values = ActionNormalizer(statistics).to_dict()
    values["statistics"]["action"]["mean"][0] += 1
    with pytest.raises(UserError, match="digest"):
        ActionNormalizer.from_dict(values)
    with pytest.raises(UserError, match="not found"):
        Statistics.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Statistics.load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="action"):
        Statistics.from_dict({"state": statistics.to_dict()["state"]})
    infinite = statistics.to_dict()
    infinite["state"]["std"][2] = float("nan")
    with pytest.raises(UserError, match="state.std"):
        Statistics.from_dict(infinite)
    with pytest.raises(UserError, match="the mask 6"):
        ActionNormalizer(statistics, "quantile", [True] * 6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("q01", 1e3, r"action: q01 .* above q99 .* dimension 2"), ("max", -1e3, "min .* above max"), ("std", -1, "std")],
)
def test_impossible_statistics_name_file_and_dimension(
    statistics: Statistics, tmp_path: Path, field: str, value: float, message: str
) -> None:
    values = statistics.to_dict()
    values["action"][field][2] = value
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"norm_stats\.json: .*{message}"):
        Statistics.load(path)


@pytest.mark.parametrize("method", ["quantile", "min_max", "mean_std"])
def test_statistics_of_other_data_are_refused_and_their_own_are_not(statistics: Statistics, method: str) -> None:
    actions = random_frames(1, 7)
    normalizer = ActionNormalizer(statistics, method, [True] * 6 + [False])  # type: ignore[arg-type]
    assert normalizer.check_fit(actions, "here") == []
    actions[:, 6] *= 100  # not normalised: may be anything
    assert normalizer.check_fit(actions, "here") == []
    elsewhere = actions.copy()
    elsewhere[:, 3] *= 20
    with pytest.raises(UserError, match=r"norm_stats\.json: \d\d% of action dimension 3 lies outside .* other data"):
        normalizer.check_fit(elsewhere, "norm_stats.json")
    with pytest.raises(UserError, match="5 action dimensions, the statistics have 7"):
        normalizer.check_fit(actions[:, :5], "here")


def test_a_dimension_that_rests_passes_with_a_remark() -> None:
    actions = random_frames(1, 7, 1000)
    actions[:, 2] = 0.7
    actions[:, 4] = np.where(np.arange(1000) == 500, 1.0, 0.0)
    read = Statistics.from_frames(random_frames(0, 8), actions).to_dict()
    read["action"] = {name: [round(value, 7) for value in vector] for name, vector in read["action"].items()}
    normalizer = ActionNormalizer(Statistics.from_dict(read))
    remarks = normalizer.check_fit(actions, "data")
    assert len(remarks) == 2
    assert "dimension 2 stays at 0.7, and so will the policy's" in remarks[0]
    assert "dimension 4 stays at" in remarks[1]
    assert "0.10% of the frames" in remarks[1]
    assert "min_max" in remarks[1]
