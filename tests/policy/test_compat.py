"""The published defects: off unless asked for, and applied by the commands that take them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from training_data import TINY, write_demonstrations

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.sft_experiment import module, open_inputs
from dtvla.policy.attention import Rule
from dtvla.policy.compat import Compat, apply
from dtvla.policy.policy import Policy
from dtvla.rollout.evaluation import evaluate, make_plan


def test_nothing_published_is_on_by_default() -> None:
    for command in ("train", "evaluate"):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose(command, ["checkpoint=x"] if command == "evaluate" else [])
        assert Compat.from_config(cfg.compat) == Compat(action_decode=None, pads_visible=False)


def test_decode_mode_is_set_and_null_keeps_the_checkpoints(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()
    ids = torch.arange(policy.processor.layout.bins.first_id + 1, policy.processor.layout.bins.last_id - 1)
    fixed = policy.processor.layout.bins.decode(ids)
    apply(policy, Compat(action_decode="published"))
    moved = policy.processor.layout.bins.decode(ids) - fixed
    assert torch.allclose(moved, torch.full_like(moved, policy.processor.layout.bins.width), atol=1e-6)
    policy.save(tmp_path / "policy")
    again = Policy.load(tmp_path / "policy")
    for compat, mode in ((Compat(), "published"), (Compat(action_decode="fixed"), "fixed")):
        apply(again, compat)
        assert again.processor.layout.bins.mode == mode


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"action_decode": "old"}, "compat.action_decode: 'old'"),
        ({"pads_visible": "yes"}, "compat.pads_visible: 'yes'"),
        ({"pads": True}, "unknown setting pads"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Compat.from_config(settings)


def test_training_starts_from_a_policy_with_the_settings(tmp_path: Path) -> None:
    demonstrations = write_demonstrations(tmp_path / "data", episodes=2, frames=4)
    overrides = [*TINY, f"data.root={demonstrations}", f"paths.root={tmp_path}"]
    for pads_visible, mode in ((True, "published"), (False, None)):
        chosen = [f"compat.pads_visible={pads_visible}", f"compat.action_decode={mode or 'null'}"]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", [*overrides, *chosen])
        policy = module(cfg, open_inputs(cfg), 0).policy
        assert policy.model.rule == Rule(pads_visible=pads_visible)
        policy.save(tmp_path / "policy", overwrite=True)
        stored = json.loads((tmp_path / "policy" / "policy.json").read_text())
        assert stored["action_decode"] == (mode or "fixed")


def test_evaluation_takes_compat_as_part_of_what_it_measures(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "policy")

    def config(*overrides: str) -> Any:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("evaluate", [f"checkpoint={tmp_path / 'policy'}", f"paths.root={tmp_path}", *overrides])

    plain, published = make_plan(config()), make_plan(config("compat.action_decode=published"))
    assert plain.settings != published.settings
    with pytest.raises(UserError, match="compat.action_decode"):
        evaluate(config("compat.action_decode=odd"))
