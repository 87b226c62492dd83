"""The build backend: scikit-build-core, told whether and with which compiler to build CUDA.

Build requirements depend on the machine, which pyproject.toml cannot express, so they are decided
here, for pip and every other PEP 517 front end:

* ``JAX_FLASHMLA_CUDA=ON`` or ``OFF`` decides; unset, CUDA is built if the machine has an NVIDIA
  driver.
* Without CUDA nothing is compiled: the wheel holds the Python files and every operation runs
  through XLA. Neither CMake nor a C++ compiler is needed.
* With CUDA, the compiler of the machine is used if it is new enough, and otherwise one from
  PyPI wheels pinned below.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scikit_build_core import build as _skbuild

SWITCH = "JAX_FLASHMLA_CUDA"

# Handlers run on a jaxlib whose FFI is as new as their headers or newer, so an isolated build
# takes the headers of the oldest jaxlib supported.
_CUDA_BUILD_REQUIRES = ["nanobind>=2.9,<4", "jaxlib==0.10.0"]
_CUDA_COMPILER_REQUIRES = ["cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==13.0.2"]
_OLDEST_CUDA = (12, 8)
_DEFAULT_CUDA_HOME = "/usr/local/cuda"

ConfigSettings = dict[str, Any] | None


def _has_driver() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _cuda_wanted() -> tuple[bool, str]:
    """Whether to build CUDA, and why, as a phrase."""
    value = os.environ.get(SWITCH, "").strip()
    if value.upper() in ("ON", "1", "TRUE", "YES"):
        return True, f"{SWITCH}={value}"
    if value.upper() in ("OFF", "0", "FALSE", "NO"):
        return False, f"{SWITCH}={value}"
    if value.upper() not in ("", "AUTO"):
        raise SystemExit(f"jax_flashmla: {SWITCH}={value} is neither ON, OFF nor AUTO")
    if _has_driver():
        return True, "this machine has an NVIDIA driver"
    return False, "this machine has no NVIDIA driver"


def _nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    try:
        text = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _machine_nvcc() -> Path | None:
    """The machine's CUDA compiler. One that is asked for by name is taken whatever its version."""
    for variable in ("CMAKE_CUDA_COMPILER", "CUDACXX"):
        if name := os.environ.get(variable):
            path = shutil.which(name)
            if path is None:
                raise SystemExit(f"jax_flashmla: {variable}={name} is not an executable file")
            return Path(path).absolute()
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _DEFAULT_CUDA_HOME]
    candidates = [shutil.which("nvcc"), *(f"{folder}/bin/nvcc" for folder in folders if folder)]
    for candidate in candidates:
        # Not resolved: nvcc finds its toolkit by the path it was called by.
        if candidate and os.access(candidate, os.X_OK):
            version = _nvcc_version(Path(candidate))
            if version is not None and version >= _OLDEST_CUDA:
                return Path(candidate).absolute()
    return None


def _wheel_nvcc() -> Path | None:
    """The CUDA compiler of the PyPI wheels, in whichever folder of packages they are."""
    for folder in sys.path:
        nvcc = Path(folder, "nvidia/cu13/bin/nvcc")
        if nvcc.exists():
            return nvcc.absolute()
    return None


def _say(line: str, *, to_terminal: bool) -> None:
    print(line, file=sys.stderr, flush=True)
    if not to_terminal or sys.stderr.isatty():
        return
    # pip shows a backend's output only with -v, so speak to the person at the terminal, if any.
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"\r\033[K{line}\n")
    except OSError:
        pass


def _settings(config_settings: ConfigSettings, *, announce: bool = False) -> dict[str, Any]:
    """The settings for scikit-build-core; those of the user win."""
    cuda, reason = _cuda_wanted()
    if not cuda:
        if announce:
            _say(
                f"jax_flashmla: building without CUDA kernels, because {reason}. "
                f"To build them, set {SWITCH}=ON in the environment and install again.",
                to_terminal=True,
            )
        return {"wheel.cmake": "false", "wheel.py-api": "py3", **(config_settings or {})}
    settings = dict(config_settings or {})
    define = "cmake.define.CMAKE_CUDA_COMPILER"
    if define not in settings and announce:
        nvcc = _machine_nvcc() or _wheel_nvcc()
        if nvcc is None:
            raise SystemExit(
                "jax_flashmla: no CUDA compiler (nvcc "
                f"{'.'.join(map(str, _OLDEST_CUDA))} or newer) was found, though {reason}. "
                f"Install with build isolation, install {_CUDA_COMPILER_REQUIRES[0]}, point "
                f"CUDACXX at one, or set {SWITCH}=OFF."
            )
        _say(
            f"jax_flashmla: building CUDA kernels with {nvcc}, because {reason}. "
            f"To leave them out, set {SWITCH}=OFF.",
            to_terminal=False,
        )
        settings[define] = str(nvcc)
    return settings


def _requires(base: list[str], config_settings: ConfigSettings) -> list[str]:
    cuda, _ = _cuda_wanted()
    if not cuda:
        return base
    named = "cmake.define.CMAKE_CUDA_COMPILER" in (config_settings or {})
    compiler = [] if named or _machine_nvcc() else _CUDA_COMPILER_REQUIRES
    return [*base, *_CUDA_BUILD_REQUIRES, *compiler]


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """PEP 517 hook: what building a wheel needs on this machine."""
    base = _skbuild.get_requires_for_build_wheel(_settings(config_settings))
    return _requires(base, config_settings)


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    """PEP 660 hook: what an editable install needs on this machine."""
    base = _skbuild.get_requires_for_build_editable(_settings(config_settings))
    return _requires(base, config_settings)


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    """PEP 517 hook: what building a source distribution needs."""
    return _skbuild.get_requires_for_build_sdist(config_settings)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    """PEP 517 hook: writes the metadata."""
    return _skbuild.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings))


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    """PEP 660 hook: writes the metadata."""
    return _skbuild.prepare_metadata_for_build_editable(
        metadata_directory, _settings(config_settings)
    )


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """PEP 517 hook: builds a wheel."""
    settings = _settings(config_settings, announce=True)
    return _skbuild.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """PEP 660 hook: builds an editable install."""
    settings = _settings(config_settings, announce=True)
    return _skbuild.build_editable(wheel_directory, settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: ConfigSettings = None) -> str:
    """PEP 517 hook: builds a source distribution."""
    return _skbuild.build_sdist(sdist_directory, config_settings)
