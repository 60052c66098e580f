"""Memory that is held twice is given back, and nothing that is still read goes with it."""

import mujoco
import numpy as np
import psutil
import pytest

from dtvla.sim.memory import drop_textures, forget_compilation, has_textures, keep_no_asset_files
from dtvla.sim.rendering import CameraRenderer, take_snapshot

SIDE = 2048
TEXTURE_BYTES = 3 * SIDE * SIDE
SCENE = f"""
<mujoco>
  <asset>
    <texture name="t" type="2d" builtin="flat" rgb1="0.9 0.1 0.1" width="{SIDE}" height="{SIDE}"/>
    <material name="m" texture="t"/>
  </asset>
  <worldbody>
    <light pos="0 0 3"/>
    <geom type="plane" size="2 2 1" material="m" group="1"/>
    <camera name="above" pos="0 0 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture
def model() -> mujoco.MjModel:
    keep_no_asset_files()
    return mujoco.MjModel.from_xml_string(SCENE)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_textures_are_given_back_and_nothing_else(model: mujoco.MjModel) -> None:
    others = {n: getattr(model, n).copy() for n in ("tex_adr", "tex_width", "geom_pos", "mat_rgba", "cam_pos")}
    before = resident()
    assert has_textures(model)
    drop_textures(model)
    assert before - resident() > 0.9 * TEXTURE_BYTES
    assert not model.tex_data.any()
    for name, value in others.items():
        np.testing.assert_array_equal(getattr(model, name), value)


def test_the_compilers_copy_is_given_back(model: mujoco.MjModel) -> None:
    before = resident()
    forget_compilation()
    assert before - resident() > 0.9 * TEXTURE_BYTES
    assert has_textures(model)
    assert model.ngeom == 1


@pytest.mark.sim
def test_a_renderer_takes_the_textures_and_shows_them(model: mujoco.MjModel) -> None:
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = CameraRenderer(model, 32)
    try:
        for _ in range(2):
            red, green, blue = renderer.render(take_snapshot(model, data), "above").mean(axis=(0, 1))
            assert red > 60
            assert red > 4 * max(green, blue)
        with pytest.raises(RuntimeError, match="compile it again"):
            CameraRenderer(model, 32)
    finally:
        renderer.close()
