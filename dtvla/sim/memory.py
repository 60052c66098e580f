"""Give back memory that a simulation holds twice: half a gigabyte and more for each process that renders.

Where it goes (libero_spatial task 0, MiB): MuJoCo's cache of asset files 260, the compiler's copy of the model that
was loaded last 300, the model's own textures 180, of which OpenGL has a copy. None of it is read again here.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import mujoco

_DONT_NEED = 4  # MADV_DONTNEED of Linux: the pages are given back and read as zeros


def keep_no_asset_files() -> None:
    """Switch MuJoCo's cache of asset files off; call it before a model is compiled.

    The functions are exported by MuJoCo 3.3, but have no Python names. Where they are missing the cache stays on.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(str(next(Path(mujoco.__file__).parent.glob("libmujoco.so*"))))
    try:
        cache, resize = library.mj_globalCache, library.mj_setCacheSize
    except AttributeError:
        return
    cache.restype, cache.argtypes = ctypes.c_void_p, []
    resize.restype, resize.argtypes = None, [ctypes.c_void_p, ctypes.c_size_t]
    resize(cache(), 0)


def forget_compilation() -> None:
    """Drop the compiler's copy of the last model, by loading a tiny one, and give free memory back to the system."""
    mujoco.MjModel.from_xml_string("<mujoco/>")
    if hasattr(_libc(), "malloc_trim"):  # glibc
        _libc().malloc_trim(ctypes.c_size_t(0))


def drop_textures(model: mujoco.MjModel) -> None:
    """Give back the model's copy of its textures, which OpenGL has been given. They read as zeros from now on."""
    if sys.platform != "linux" or model.ntexdata == 0:
        return
    data = model.tex_data
    head = -data.ctypes.data % mmap.PAGESIZE
    pages = max(0, data.nbytes - head) // mmap.PAGESIZE * mmap.PAGESIZE
    if pages and _libc().madvise(ctypes.c_void_p(data.ctypes.data + head), ctypes.c_size_t(pages), _DONT_NEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise on the textures of a model failed")
    data[:head] = data[head + pages :] = 0  # the pages at the edges hold other parts of the model, too


def has_textures(model: mujoco.MjModel) -> bool:
    """Whether the model's textures are there: there are none, or some byte of them is not zero."""
    return model.ntexdata == 0 or bool(model.tex_data.any())


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
