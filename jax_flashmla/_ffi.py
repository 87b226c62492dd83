"""The compiled extension: finds it, checks that it fits the installed JAX, registers its handlers.

Importing this module does all three. Without an extension (a build without CUDA, or a source
checkout) everything still works, through XLA.

XLA refuses a handler compiled against a newer FFI than its own, but says so late and obscurely
(on a GPU only in the log), so the versions are compared here first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from types import ModuleType
from typing import Any

import jax
import jaxlib

from jax_flashmla._version import __version__

OLDEST_JAXLIB = (0, 10, 0)
SUPPORTED = "jax and jaxlib >=0.10,<0.13"

# The first jaxlib with each version of the XLA FFI, from OLDEST_JAXLIB on.
FIRST_JAXLIB_WITH_FFI = {(0, 3): "0.10.0", (0, 4): "0.11.1", (0, 5): "0.12.0"}

_EXTENSION = "jax_flashmla._ext"


def _numbers(version: str) -> tuple[int, ...]:
    """``"0.12.0.1rc1"`` -> ``(0, 12, 0, 1)``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def check_jaxlib(version: str) -> None:
    """Raises ImportError if this jaxlib is older than the oldest supported one."""
    if _numbers(version) < OLDEST_JAXLIB:
        raise ImportError(
            f"jax_flashmla {__version__} needs {SUPPORTED}, but jaxlib {version} is installed. "
            "Upgrade with: pip install --upgrade 'jax>=0.10,<0.13'"
        )


def check_ffi(compiled: tuple[int, int], runtime: tuple[int, int], version: str) -> None:
    """Raises ImportError if jaxlib's XLA FFI cannot run handlers compiled against ``compiled``.

    The major versions must be equal and the minor version of the runtime at least the compiled.
    """
    if compiled[0] == runtime[0] and compiled[1] <= runtime[1]:
        return
    first = FIRST_JAXLIB_WITH_FFI.get(compiled)
    fits = f"jaxlib >={first},<0.13" if first else "a newer jaxlib"
    if compiled[0] != runtime[0]:
        fits = f"a jaxlib with XLA FFI {compiled[0]}.{compiled[1]} or a later {compiled[0]}.x"
    raise ImportError(
        f"jax_flashmla {__version__} was compiled for XLA FFI {compiled[0]}.{compiled[1]}, which "
        f"needs {fits}, but jaxlib {version} is installed, which has XLA FFI "
        f"{runtime[0]}.{runtime[1]}. Install {fits}, or install jax_flashmla from source again "
        "(pip install . in its checkout)"
    )


def ffi_version(include_dir: str) -> tuple[int, int]:
    """The (major, minor) version of the XLA FFI whose headers are in ``include_dir``.

    Raises ImportError if there are none.
    """
    path = os.path.join(include_dir, "xla", "ffi", "api", "c_api.h")
    try:
        with open(path, encoding="utf-8") as header:
            text = header.read()
    except OSError as error:
        raise ImportError(f"jaxlib {jaxlib.__version__} has no XLA FFI headers: {error}") from error
    numbers = []
    for part in ("MAJOR", "MINOR"):
        found = re.search(rf"^#define XLA_FFI_API_{part} (\d+)", text, re.MULTILINE)
        if found is None:
            raise ImportError(f"{path} does not define XLA_FFI_API_{part}; needs {SUPPORTED}")
        numbers.append(int(found[1]))
    return numbers[0], numbers[1]


def _installed_extension() -> str | None:
    """The extension's file in an installed jax_flashmla of this version.

    Python started in a source checkout imports the package from there, where no extension is,
    although one was installed.
    """
    for distribution in importlib.metadata.distributions(name="jax_flashmla"):
        if distribution.version != __version__:
            continue
        for file in distribution.files or ():
            path = str(distribution.locate_file(file))
            if file.parent.name == "jax_flashmla" and _is_extension(path):
                return path
    return None


def _is_extension(path: str) -> bool:
    suffixes = tuple("_ext" + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return os.path.basename(path) in suffixes and os.path.exists(path)


@functools.cache
def extension() -> ModuleType | None:
    """The compiled extension, None if there is none. A broken one raises ImportError."""
    if _EXTENSION in sys.modules:
        return sys.modules[_EXTENSION]
    if importlib.util.find_spec(_EXTENSION) is not None:
        return importlib.import_module(_EXTENSION)
    path = _installed_extension()
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location(_EXTENSION, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_EXTENSION] = module
    return module


def build_info() -> dict[str, Any]:
    """What was built.

    ``cuda`` (bool) always; with CUDA also ``version`` of the package, ``cuda_compiler`` (its
    version), ``cuda_runtime`` (13000 for 13.0), ``architectures`` (a tuple like ``("90a",)``),
    ``ffi_api_version`` (the XLA FFI compiled against) and ``path`` of the extension.
    """
    module = extension()
    if module is None:
        return {"cuda": False, "architectures": ()}
    return {**module.build_info(), "path": module.__file__}


def cuda_built() -> bool:
    """Whether this build of the package has CUDA kernels."""
    return bool(build_info()["cuda"])


def cuda_architectures() -> tuple[str, ...]:
    """The architectures that kernels were compiled for, like ``("90a",)``; empty without CUDA."""
    return tuple(build_info()["architectures"])


def _architecture_fits(architecture: str, compute_capability: str) -> bool:
    major, _, minor = compute_capability.partition(".")
    number = architecture.rstrip("abcdefghijklmnopqrstuvwxyz")
    if number != architecture:  # "90a" runs on 9.0 alone
        return number == major + minor
    # Machine code runs on later minor versions of its major version.
    return number[:-1] == major and int(number[-1]) <= int(minor or 0)


def kernels_decline(compute_capability: str) -> str | None:
    """Why the kernels cannot run on a GPU of this compute capability ("9.0"); None if they can."""
    module = extension()
    if module is None or not cuda_built():
        return (
            "this installation was built without CUDA kernels; set JAX_FLASHMLA_CUDA=ON in the "
            "environment and install jax_flashmla again"
        )
    built = cuda_architectures()
    if not any(_architecture_fits(name, compute_capability) for name in built):
        names = ", ".join("sm_" + name for name in built)
        return f"the kernels are for {names}, not for compute capability {compute_capability}"
    runtime, driver = int(build_info()["cuda_runtime"]), int(module.driver_version())
    # A driver runs programs of any minor version of its own major version, and of older ones.
    if 0 < driver and driver // 1000 < runtime // 1000:
        return (
            f"the kernels were built with CUDA {runtime // 1000}, but the NVIDIA driver supports "
            f"CUDA {driver // 1000}.{driver % 1000 // 10}; update the driver, or build "
            "jax_flashmla with an older nvcc"
        )
    return None


def kernels_for(compute_capability: str) -> bool:
    """Whether the kernels run on a GPU of this compute capability, like "9.0"."""
    return kernels_decline(compute_capability) is None


@functools.cache
def register() -> None:
    """Checks the versions and registers the handlers for platform "CUDA", once.

    Raises ImportError if jaxlib is too old for the package or for the compiled handlers.
    """
    check_jaxlib(jaxlib.__version__)
    module = extension()
    if module is None:
        return
    info = module.build_info()
    if info["version"] != __version__:
        raise ImportError(
            f"jax_flashmla {__version__} found the compiled extension of version "
            f"{info['version']} at {module.__file__}: install jax_flashmla again"
        )
    check_ffi(info["ffi_api_version"], ffi_version(jax.ffi.include_dir()), jaxlib.__version__)
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")


register()
