"""Importing LIBERO quietly, and choosing an OpenGL backend by really trying it.

Both are process-wide and happen once: robosuite and PyOpenGL fix their backend on import.
"""

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

from dtvla.errors import UserError

BACKENDS = ("egl", "osmesa", "glfw")
_PACKAGES = "apt-get install libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri libosmesa6"


def _try_backend(name: str) -> str | None:
    """Create and free one context of the backend; the reason why not, or None when it works."""
    try:
        context = importlib.import_module(f"mujoco.{name}").GLContext(64, 64)
        context.make_current()
        context.free()
    except Exception as error:  # PyOpenGL raises AttributeError, ImportError, GLError or RuntimeError, by platform
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _forget_backend(name: str) -> None:
    """Unload PyOpenGL, which binds itself to one platform on import, so that another backend can be tried."""
    for module in [m for m in sys.modules if m.split(".")[0] == "OpenGL" or m.startswith(f"mujoco.{name}")]:
        del sys.modules[module]
    os.environ.pop("PYOPENGL_PLATFORM", None)


@cache
def gl_backend() -> str:
    """Name of the OpenGL backend of this process, and set ``MUJOCO_GL`` to it.

    ``MUJOCO_GL`` is honoured when set; otherwise EGL, then OSMesa, is taken if a context can be created.

    Raises:
        UserError: nothing works; names the Debian packages that help.
    """
    # Mesa would write a shader cache into the home folder.
    os.environ.setdefault("MESA_SHADER_CACHE_DISABLE", "true")
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if wanted and wanted not in BACKENDS:
        raise UserError(f"MUJOCO_GL: {wanted!r} can't render without a screen; unset it, or use egl or osmesa")
    reasons = []
    for name in (wanted,) if wanted else ("egl", "osmesa"):
        reason = _try_backend(name)
        if reason is None:
            os.environ["MUJOCO_GL"] = name
            return name
        _forget_backend(name)
        reasons.append(f"{name} ({reason})")
    raise UserError(f"renderer: no OpenGL context from {' nor '.join(reasons)}; on Debian or Ubuntu: {_PACKAGES}")


@cache
def import_libero() -> ModuleType:
    """Import ``libero.libero.envs`` without a print, a log file or a write into the home folder.

    Raises:
        UserError: no OpenGL backend (robosuite imports one), or a package is missing.
    """
    from dtvla.sim.memory import keep_no_asset_files

    gl_backend()
    keep_no_asset_files()
    _preset_robosuite_macros()
    with _TemporaryMatplotlibFolder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old packages: escape sequences, deprecations
        try:
            return importlib.import_module("libero.libero.envs")
        except ImportError as error:
            raise UserError(
                f"libero: the simulator can't be imported ({error}); reinstall dtvla's pinned packages"
            ) from error


def _preset_robosuite_macros() -> None:
    """Load robosuite's macros ahead of it: no /tmp/robosuite.log, no warnings, no numba cache in the home folder.

    robosuite reads them while it is imported, so they can't be set afterwards. No physics setting is touched.
    """
    if "robosuite" in sys.modules:
        return
    package = importlib.util.find_spec("robosuite")
    if package is None or package.origin is None:
        raise UserError("robosuite: not installed; install dtvla's pinned packages")
    folder = Path(package.origin).parent
    spec = importlib.util.spec_from_file_location("robosuite.macros", folder / "macros.py")
    assert spec is not None
    assert spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    settings = {
        "FILE_LOGGING_LEVEL": None,
        "CONSOLE_LOGGING_LEVEL": "ERROR",
        "CACHE_NUMBA": os.access(folder / "utils", os.W_OK),
    }  # else numba caches below the home folder
    for key, value in settings.items():
        setattr(macros, key, value)
    sys.modules["robosuite.macros"] = macros


class _TemporaryMatplotlibFolder:
    """LIBERO imports matplotlib, which creates a folder in the home folder unless told another one."""

    def __enter__(self) -> None:
        self.active = "MPLCONFIGDIR" not in os.environ and "matplotlib" not in sys.modules
        if self.active:
            self.folder = tempfile.mkdtemp(prefix="dtvla-matplotlib-")
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
            os.environ["MPLCONFIGDIR"] = self.folder

    def __exit__(self, *_: object) -> None:
        if self.active:
            del os.environ["MPLCONFIGDIR"]
