"""Protects that lengths known beforehand are those of the sequences that are made."""

from pathlib import Path

import numpy as np
import pytest

from dtvla.data.demonstrations import Demonstrations
from dtvla.data.lengths import SequenceLengths
from dtvla.errors import UserError

from .conftest import make_processor


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("thoughts", [True, False])
def test_lengths_are_those_of_the_encoded_samples(dataset_root: Path, thoughts: bool, acts: bool) -> None:
    demonstrations = Demonstrations(dataset_root, thoughts=thoughts)
    layout = make_processor(demonstrations.texts(), demonstrations.statistics).layout
    rng = np.random.default_rng(0)
    frames_B, bare_B = rng.integers(0, len(demonstrations), 60), rng.random(60) < 0.3
    found_B = SequenceLengths(demonstrations, layout, acts=acts)(frames_B, bare_B)
    for frame, bare, found in zip(frames_B, bare_B, found_B, strict=True):
        thought = None if bare else demonstrations.thought(frame)
        sample = layout.encode(demonstrations.instruction(frame), thought, None, acts=acts)
        assert len(sample.input_ids_T) == found


def test_an_unknown_treatment_of_long_thoughts_is_named(dataset_root: Path) -> None:
    demonstrations = Demonstrations(dataset_root)
    layout = make_processor(demonstrations.texts(), demonstrations.statistics).layout
    with pytest.raises(UserError, match=r"data.long_thoughts: 'drop'"):
        SequenceLengths(demonstrations, layout, "drop")
