"""Find the system libraries that dtvla's Python packages load, by really loading them.

Prints one line ``required PACKAGE`` or ``optional PACKAGE`` (Debian's names) for each that is missing, nothing when all
are there. Standard library only: this runs before anything is installed.
"""

import ctypes
import glob

EGL_DRIVERS = (
    "/usr/lib*/dri/*swrast_dri.so",
    "/usr/lib/*/dri/*swrast_dri.so",
    "/usr/lib*/libgallium*.so*",
    "/usr/lib/*/libgallium*.so*",
)


def loads(*names: str) -> bool:
    """Return whether the dynamic linker finds at least one of the libraries."""
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def missing() -> list[tuple[str, str]]:
    """Return (``required`` or ``optional``, Debian package) of every library that cannot be loaded."""
    nvidia = loads("libEGL_nvidia.so.0")
    found = [
        ("required", "libegl1", loads("libEGL.so.1")),
        ("required", "libgl1", loads("libGL.so.1")),
        ("required", "libegl-mesa0", nvidia or loads("libEGL_mesa.so.0")),
        ("required", "libgl1-mesa-dri", nvidia or any(glob.glob(pattern) for pattern in EGL_DRIVERS)),
        ("required", "libglib2.0-0", loads("libgthread-2.0.so.0")),  # OpenCV, which LIBERO and robosuite import
        ("optional", "libosmesa6", loads("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")),  # the second renderer
        # torchcodec, the fast video decoder; without it lerobot decodes through PyAV, which brings its own.
        ("optional", "ffmpeg", loads(*(f"libavutil.so.{major}" for major in range(56, 62)))),
    ]
    return [(need, package) for need, package, there in found if not there]


if __name__ == "__main__":
    for need, package in missing():
        print(need, package)
