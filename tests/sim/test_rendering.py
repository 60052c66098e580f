"""Thinning meshes changes what is drawn and nothing else."""

import mujoco
import numpy as np

from dtvla.sim.rendering import thin_visual_meshes


def ball(rng: np.random.Generator, count: int = 3000) -> str:
    points = rng.normal(size=(count, 3))
    points = 0.1 * points / np.linalg.norm(points, axis=1, keepdims=True)
    return " ".join(f"{value:.5f}" for value in points.ravel())


def test_only_large_visual_meshes_are_thinned_and_stay_well_formed() -> None:
    rng = np.random.default_rng(0)
    model = mujoco.MjModel.from_xml_string(f"""
      <mujoco><asset>
        <mesh name="seen" vertex="{ball(rng)}"/><mesh name="solid" vertex="{ball(rng)}"/>
        <mesh name="both" vertex="{ball(rng)}"/><mesh name="small" vertex="{ball(rng, 60)}"/>
      </asset><worldbody><body><freejoint/><geom size=".1"/>
        <geom type="mesh" mesh="seen" contype="0" conaffinity="0" mass="0"/>
        <geom type="mesh" mesh="solid" mass="0"/>
        <geom type="mesh" mesh="both" contype="0" conaffinity="0" mass="0"/><geom type="mesh" mesh="both" mass="0"/>
        <geom type="mesh" mesh="small" contype="0" conaffinity="0" mass="0"/>
      </body></worldbody></mujoco>""")
    faces_before = model.mesh_facenum.copy()
    vertices_before = model.mesh_vert.copy()
    thin_visual_meshes(model, 0.02)
    assert model.mesh_facenum[0] < faces_before[0] / 3
    np.testing.assert_array_equal(model.mesh_facenum[1:], faces_before[1:])
    np.testing.assert_array_equal(model.mesh_vert, vertices_before)
    start, count = model.mesh_faceadr[0], model.mesh_facenum[0]
    faces = np.sort(model.mesh_face[start : start + count], axis=1)
    assert faces.min() >= 0
    assert faces.max() < model.mesh_vertnum[0]
    assert (np.diff(faces, axis=1) > 0).all(), "a face has lost a corner"
    assert len(np.unique(faces, axis=0)) == count, "a face is drawn twice"
    assert model.mesh_facenormal[start : start + count].max() < model.mesh_normalnum[0]
