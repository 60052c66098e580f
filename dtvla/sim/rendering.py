"""Pictures of a MuJoCo model: LIBERO's own quality, or a draft that is several times faster on a CPU.

robosuite renders inside every simulation step; here a picture is made only when somebody asks for one.
"""

import atexit
import importlib
import weakref
from typing import Literal

import mujoco
import numpy as np

from dtvla.errors import UserError
from dtvla.sim.backend import gl_backend
from dtvla.sim.memory import drop_textures, forget_compilation, has_textures

# What mjv_updateScene reads from a simulation of rigid bodies.
_POSES = (
    "xpos",
    "xquat",
    "xmat",
    "xipos",
    "ximat",
    "geom_xpos",
    "geom_xmat",
    "site_xpos",
    "site_xmat",
    "cam_xpos",
    "cam_xmat",
    "light_xpos",
    "light_xdir",
)
Snapshot = dict[str, np.ndarray]

_DRAFT_CELL_M = 0.01
_DRAFT_MIN_FACES = 300
_COLLISION_GROUP = 0
_ALIVE: "weakref.WeakSet[CameraRenderer]" = weakref.WeakSet()


def take_snapshot(model: mujoco.MjModel, data: mujoco.MjData) -> Snapshot:
    """Copy what a picture of this moment needs (some 20 kB), so that it can be rendered later, or never.

    LIBERO marks a lit stove by the colour of a site of the model, so that is part of the moment, too.
    """
    return {name: getattr(data, name).copy() for name in _POSES} | {"site_rgba": model.site_rgba.copy()}


class CameraRenderer:
    """Renders the cameras of one model into uint8 pictures of ``size`` x ``size`` x 3, turned the right way up.

    Several renderers may live in one process: each makes its own context current before it draws.
    With ``quality="draft"`` the model's purely visual meshes are thinned in place, which changes pictures only.
    The model's textures move to OpenGL: a model can be given to one renderer only.

    Raises:
        UserError: no OpenGL backend works, or the picture size is refused by the driver.
        RuntimeError: the model has had a renderer.
    """

    def __init__(self, model: mujoco.MjModel, size: int, quality: Literal["full", "draft"] = "full"):
        if not has_textures(model):
            raise RuntimeError("this model has had a renderer, which has its textures; compile it again")
        self.model = model
        self.size = size
        if quality == "draft":
            thin_visual_meshes(model, _DRAFT_CELL_M)
            model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        backend = importlib.import_module(f"mujoco.{gl_backend()}")
        atexit.unregister(_close_all)
        atexit.register(_close_all)  # after the backend's own clean-up was registered, so that it runs before it
        self._gl = backend.GLContext(size, size)
        self._gl.make_current()
        try:
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except mujoco.FatalError as error:
            self._gl.free()
            raise UserError(
                f"image_size: a {size}x{size} picture can't be rendered here ({error}); use a smaller one"
            ) from error
        drop_textures(model)
        forget_compilation()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._data = mujoco.MjData(model)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[_COLLISION_GROUP] = 0
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        if quality == "draft":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        _ALIVE.add(self)

    def render(self, snapshot: Snapshot, camera: str) -> np.ndarray:
        """Picture of a moment from a camera of the model (its MuJoCo name), uint8 (size, size, 3).

        OpenGL's first row is the lowest and LIBERO's cameras are mounted mirrored; as everywhere in the field the
        picture is turned by 180 degrees.
        """
        self._gl.make_current()
        for name in _POSES:
            getattr(self._data, name)[:] = snapshot[name]
        site_rgba = self.model.site_rgba.copy()
        self.model.site_rgba[:] = snapshot["site_rgba"]
        self._camera.fixedcamid = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        mujoco.mjv_updateScene(
            self.model, self._data, self._options, self._perturb, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        self.model.site_rgba[:] = site_rgba
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        picture_HWC = np.empty((self.size, self.size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(picture_HWC, None, self._viewport, self._context)
        return np.ascontiguousarray(picture_HWC[::-1, ::-1])

    def close(self) -> None:
        """Free the context. Safe to call twice."""
        if self in _ALIVE:
            _ALIVE.discard(self)
            self._gl.make_current()
            self._context.free()
            self._gl.free()


def _close_all() -> None:
    """Free contexts while the OpenGL modules are still there; their destructors would print errors at exit."""
    for renderer in list(_ALIVE):
        renderer.close()


def thin_visual_meshes(model: mujoco.MjModel, cell_m: float) -> None:
    """Merge the vertices of large meshes that never collide into cells of ``cell_m``, in place.

    Vertex clustering (Rossignac and Borrel 1993): every vertex moves to the first vertex of its cell, faces that
    collapse or repeat are dropped. Positions, masses and collisions don't use these faces, so states don't change.
    """
    is_mesh_G = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    collides_G = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    visual = set(model.geom_dataid[is_mesh_G & ~collides_G]) - set(model.geom_dataid[is_mesh_G & collides_G])
    for mesh in sorted(visual):
        if model.mesh_facenum[mesh] >= _DRAFT_MIN_FACES:
            _thin_mesh(model, int(mesh), cell_m)


def _thin_mesh(model: mujoco.MjModel, mesh: int, cell_m: float) -> None:
    vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
    start, count = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
    faces = slice(start, start + count)
    cell_V3 = np.floor(model.mesh_vert[vertices] / cell_m).astype(np.int64)
    _, first, cell_of_V = np.unique(_one_number(cell_V3), return_index=True, return_inverse=True)
    face_F3 = first[cell_of_V][model.mesh_face[faces]]
    sorted_F3 = np.sort(face_F3, axis=1)
    whole = np.flatnonzero((np.diff(sorted_F3, axis=1) > 0).all(axis=1))
    _, unique = np.unique(_one_number(sorted_F3[whole]), return_index=True)
    kept = whole[np.sort(unique)]
    left = slice(start, start + len(kept))
    for array, values in (
        (model.mesh_face, face_F3),
        (model.mesh_facenormal, model.mesh_facenormal[faces]),
        (model.mesh_facetexcoord, model.mesh_facetexcoord[faces]),
    ):
        array[left] = values[kept]
    model.mesh_facenum[mesh] = len(kept)


def _one_number(rows_N3: np.ndarray) -> np.ndarray:
    """A number (N,) for each row of whole numbers, equal for equal rows: numpy sorts these several times as fast."""
    low, high = rows_N3.min(axis=0, initial=0), rows_N3.max(axis=0, initial=0)
    return np.ravel_multi_index((rows_N3 - low).T, high - low + 1)
