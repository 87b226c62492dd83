"""Installation: version guards, finding and registering the extension, what the build decides."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import types
from pathlib import Path

import jax
import jaxlib
import pytest

from jax_flashmla import _ffi
from jax_flashmla._version import __version__

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"({__version__})" in (ROOT / "CHANGELOG.md").read_text()


# --- Versions of jaxlib and of the XLA FFI --------------------------------------------------


@pytest.mark.parametrize("version", ["0.10.0", "0.10.2", "0.11.0.dev20260101", "0.12.0.1", "1.0"])
def test_supported_jaxlib_is_accepted(version):
    _ffi.check_jaxlib(version)


@pytest.mark.parametrize("version", ["0.9.2", "0.4.38", "0.9.0.1"])
def test_old_jaxlib_is_refused(version):
    with pytest.raises(ImportError, match=r"needs jax and jaxlib >=0\.10,<0\.13") as error:
        _ffi.check_jaxlib(version)
    assert f"jaxlib {version} is installed" in str(error.value)


@pytest.mark.parametrize(
    "compiled, runtime", [((0, 3), (0, 3)), ((0, 3), (0, 5)), ((1, 0), (1, 2))]
)
def test_ffi_of_the_same_or_an_older_version_is_accepted(compiled, runtime):
    _ffi.check_ffi(compiled, runtime, "0.12.0")


@pytest.mark.parametrize(
    "compiled, runtime, fits",
    [
        ((0, 4), (0, 3), "jaxlib >=0.11.1,<0.13"),
        ((0, 5), (0, 4), "jaxlib >=0.12.0,<0.13"),
        ((0, 9), (0, 5), "a newer jaxlib"),
        ((0, 3), (1, 0), "a jaxlib with XLA FFI 0.3 or a later 0.x"),
        ((1, 0), (0, 5), "a jaxlib with XLA FFI 1.0 or a later 1.x"),
    ],
)
def test_ffi_that_the_runtime_refuses_raises(compiled, runtime, fits):
    with pytest.raises(ImportError) as error:
        _ffi.check_ffi(compiled, runtime, "0.10.2")
    message = str(error.value)
    assert f"needs {fits}," in message
    assert f"XLA FFI {compiled[0]}.{compiled[1]}" in message
    assert f"jaxlib 0.10.2 is installed, which has XLA FFI {runtime[0]}.{runtime[1]}" in message


def test_ffi_version_of_the_installed_jaxlib():
    installed = tuple(int(part) for part in re.findall(r"\d+", jaxlib.__version__)[:3])
    expected = max(
        ffi
        for ffi, first in _ffi.FIRST_JAXLIB_WITH_FFI.items()
        if tuple(map(int, first.split("."))) <= installed
    )
    assert _ffi.ffi_version(jax.ffi.include_dir()) == expected


def test_ffi_version_without_headers(tmp_path):
    with pytest.raises(ImportError, match="has no XLA FFI headers"):
        _ffi.ffi_version(str(tmp_path))
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n")
    with pytest.raises(ImportError, match="XLA_FFI_API_MINOR"):
        _ffi.ffi_version(str(tmp_path))


# --- The extension --------------------------------------------------------------------------


def _run_with_extension(body: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that has a stand-in extension when it imports the package."""
    setup = textwrap.dedent(
        """
        import sys, types
        import jax
        registered = []
        jax.ffi.register_ffi_target = lambda *args, **kwargs: registered.append((args, kwargs))
        ext = types.ModuleType("jax_flashmla._ext")
        ext.__file__ = "/somewhere/_ext.abi3.so"
        info = dict(version=VERSION, cuda=True, cuda_compiler="13.0.88", cuda_runtime=13000,
                    architectures=("80", "90a"), ffi_api_version=(0, 3))
        ext.build_info = lambda: info
        ext.registrations = lambda: {"flashmla_dense_decode": "a capsule"}
        driver = 0
        ext.driver_version = lambda: driver
        sys.modules["jax_flashmla._ext"] = ext
        """
    ).replace("VERSION", repr(__version__))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    package_home = str(Path(_ffi.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(body)],
        cwd=package_home,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_handlers_are_registered_for_cuda_once():
    done = _run_with_extension(
        """
        import jax_flashmla
        from jax_flashmla import _ffi
        _ffi.register()
        assert registered == [(("flashmla_dense_decode", "a capsule"), {"platform": "CUDA"})]
        assert _ffi.cuda_built() and _ffi.cuda_architectures() == ("80", "90a")
        assert _ffi.build_info()["path"] == "/somewhere/_ext.abi3.so"
        """
    )
    assert done.returncode == 0, done.stderr


def test_extension_for_a_newer_jaxlib_is_an_import_error():
    done = _run_with_extension(
        """
        info["ffi_api_version"] = (0, 99)
        import jax_flashmla
        """
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: jax_flashmla ") and "XLA FFI 0.99" in last
    assert f"jaxlib {jaxlib.__version__} is installed" in last
    assert "Unable to initialize backend" not in done.stderr


def test_extension_of_another_version_is_an_import_error():
    done = _run_with_extension(
        """
        info["version"] = "0.0.1"
        import jax_flashmla
        """
    )
    assert done.returncode == 1
    assert "extension of version 0.0.1 at /somewhere/_ext.abi3.so" in done.stderr


def test_old_jaxlib_is_an_import_error():
    done = _run_with_extension(
        """
        import jaxlib
        jaxlib.__version__ = "0.9.2"
        import jax_flashmla
        """
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "jaxlib 0.9.2 is installed" in done.stderr


def test_which_gpus_the_kernels_run_on():
    done = _run_with_extension(
        """
        from jax_flashmla import _ffi
        fits = {c: _ffi.kernels_for(c) for c in ("7.5", "8.0", "8.9", "9.0", "10.0", "12.0")}
        assert fits == {"7.5": False, "8.0": True, "8.9": True, "9.0": True, "10.0": False,
                        "12.0": False}, fits
        assert "sm_80, sm_90a" in _ffi.kernels_decline("10.0")
        assert "10.0" in _ffi.kernels_decline("10.0")
        info["architectures"] = ("90a",)
        assert not _ffi.kernels_for("9.1")  # 90a is for 9.0 alone
        driver = 12080
        assert "supports CUDA 12.8" in _ffi.kernels_decline("9.0")
        driver = 13010
        assert _ffi.kernels_decline("9.0") is None
        """
    )
    assert done.returncode == 0, done.stderr


def test_without_an_extension_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(_ffi, "extension", lambda: None)
    assert _ffi.build_info() == {"cuda": False, "architectures": ()}
    assert not _ffi.cuda_built()
    assert _ffi.cuda_architectures() == ()
    assert "JAX_FLASHMLA_CUDA=ON" in _ffi.kernels_decline("9.0")


def _install(folder: Path, version: str) -> Path:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    extension = folder / "jax_flashmla" / f"_ext{suffix}"
    extension.parent.mkdir(parents=True)
    extension.touch()
    info = folder / f"jax_flashmla-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: jax_flashmla\nVersion: {version}\n"
    )
    (info / "RECORD").write_text(f"jax_flashmla/__init__.py,,\njax_flashmla/_ext{suffix},,\n")
    return extension


def test_a_checkout_finds_the_installed_extension_of_its_version(tmp_path, monkeypatch):
    old, right = tmp_path / "old", tmp_path / "right"
    _install(old, "0.0.1")
    extension = _install(right, __version__)
    monkeypatch.setattr(sys, "path", [str(old)])
    assert _ffi._installed_extension() is None
    monkeypatch.setattr(sys, "path", [str(old), str(right)])
    assert _ffi._installed_extension() == str(extension)


@pytest.mark.skipif(not _ffi.cuda_built(), reason="built without CUDA")
def test_the_real_extension():
    info = _ffi.build_info()
    assert info["version"] == __version__
    assert info["cuda_runtime"] >= 12080
    assert "90a" in info["architectures"]
    assert info["ffi_api_version"] >= (0, 3)
    names = set(_ffi.extension().registrations())
    assert names >= {"flashmla_cache_append", "flashmla_cache_gather", "flashmla_metadata"}
    assert names >= {"flashmla_dense_decode", "flashmla_sparse_decode"}
    # It may not need the driver or an installed CUDA runtime.
    needed = subprocess.run(["ldd", info["path"]], capture_output=True, text=True).stdout
    assert "libcuda" not in needed, needed


# --- The build backend ----------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The build backend on a machine with nothing, over a recording scikit-build-core."""
    skbuild = types.ModuleType("scikit_build_core")
    skbuild.build = types.SimpleNamespace(
        get_requires_for_build_wheel=lambda settings: [f"cmake:{settings.get('wheel.cmake', '')}"],
        build_wheel=lambda directory, settings, metadata: settings,
    )
    monkeypatch.setitem(sys.modules, "scikit_build_core", skbuild)
    spec = importlib.util.spec_from_file_location(
        "build_backend", ROOT / "csrc" / "build_backend" / "jax_flashmla_build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("JAX_FLASHMLA_CUDA", "CMAKE_CUDA_COMPILER", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(module, "_DEFAULT_CUDA_HOME", str(tmp_path / "no-cuda"))
    monkeypatch.setattr(module, "_has_driver", lambda: False)
    monkeypatch.setattr(module.sys, "path", [str(tmp_path / "site-packages")])
    return module


def _nvcc(path: Path, release: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "value, driver, wanted",
    [
        (None, False, False),
        (None, True, True),
        ("AUTO", True, True),
        ("ON", False, True),
        ("1", False, True),
        ("off", True, False),
        ("0", True, False),
        ("", True, True),
    ],
)
def test_the_switch_decides_and_else_the_driver(backend, monkeypatch, value, driver, wanted):
    if value is not None:
        monkeypatch.setenv("JAX_FLASHMLA_CUDA", value)
    monkeypatch.setattr(backend, "_has_driver", lambda: driver)
    assert backend._cuda_wanted()[0] == wanted


def test_a_bad_switch_is_refused(backend, monkeypatch):
    monkeypatch.setenv("JAX_FLASHMLA_CUDA", "maybe")
    with pytest.raises(SystemExit, match="JAX_FLASHMLA_CUDA=maybe is neither ON, OFF nor AUTO"):
        backend.get_requires_for_build_wheel()


def test_without_cuda_nothing_is_compiled_and_the_build_says_so(backend, capfd):
    assert backend.get_requires_for_build_wheel() == ["cmake:false"]
    settings = backend.build_wheel("wheels", {"a": "b"})
    assert settings == {"wheel.cmake": "false", "wheel.py-api": "py3", "a": "b"}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "without CUDA kernels" in lines[0] and "JAX_FLASHMLA_CUDA=ON" in lines[0]


def test_cuda_takes_the_compiler_from_pypi_only_if_the_machine_has_none(
    backend, monkeypatch, tmp_path
):
    monkeypatch.setenv("JAX_FLASHMLA_CUDA", "ON")
    requires = backend.get_requires_for_build_wheel()
    assert "jaxlib==0.10.0" in requires
    assert "cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==13.0.2" in requires
    # As installed by a front end.
    nvcc = _nvcc(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc", "13.0")
    define = "cmake.define.CMAKE_CUDA_COMPILER"
    assert backend.build_wheel("wheels") == {define: str(nvcc)}

    machine = _nvcc(tmp_path / "bin" / "nvcc", "12.9")
    assert not any("cuda-toolkit" in r for r in backend.get_requires_for_build_wheel())
    assert backend.build_wheel("wheels") == {define: str(machine)}
    # What the user says wins.
    assert backend.build_wheel("wheels", {define: "mine"}) == {define: "mine"}


def test_a_machine_compiler_that_is_too_old_is_passed_over(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_FLASHMLA_CUDA", "ON")
    _nvcc(tmp_path / "bin" / "nvcc", "11.8")
    assert backend._machine_nvcc() is None
    home = _nvcc(tmp_path / "cuda" / "bin" / "nvcc", "13.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert backend._machine_nvcc() == home
    named = _nvcc(tmp_path / "other" / "nvcc", "12.8")
    monkeypatch.setenv("CUDACXX", str(named))
    assert backend._machine_nvcc() == named
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="CUDACXX=.*nothing is not an executable file"):
        backend.get_requires_for_build_wheel()


def test_cuda_without_any_compiler_names_the_ways_out(backend, monkeypatch):
    monkeypatch.setenv("JAX_FLASHMLA_CUDA", "ON")
    with pytest.raises(SystemExit, match="no CUDA compiler") as error:
        backend.build_wheel("wheels")
    assert "CUDACXX" in str(error.value) and "JAX_FLASHMLA_CUDA=OFF" in str(error.value)
