"""Test configuration: virtual devices for sharding tests, and when GPU tests run.

Tests marked ``gpu`` run where JAX has a CUDA device and the kernels are built for it. Elsewhere
they are deselected, and the summary says how many and why. With ``--require-gpu`` there is no
elsewhere: a missing GPU is an error, and so is a skipped test. A GPU test that fails and leaves
its process without a usable GPU ends the run: after an illegal access every later test would fail.
"""

from __future__ import annotations

import os

import gpu_state
import pytest

# Before any test starts a JAX backend. GPU runs see these CPU devices too.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

_deselected = pytest.StashKey[tuple[int, str]]()


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail without a usable CUDA GPU, and if any test is skipped",
    )


def _no_gpu() -> str | None:
    """Why GPU tests cannot run here, None if they can."""
    import jax

    from jax_flashmla import _ffi

    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return "JAX sees no CUDA device"
    return _ffi.kernels_decline(devices[0].compute_capability)


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    required = config.getoption("--require-gpu")
    if not marked and not required:
        return
    reason = _no_gpu()
    if reason is None:
        return
    if required:
        raise pytest.UsageError(f"--require-gpu: {reason}")
    config.stash[_deselected] = (len(marked), reason)
    config.hook.pytest_deselected(items=marked)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    gpu_state.end_run_if_lost(item, report)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """With pytest-xdist the workers collect, each everything, and the controller reports."""
    output = getattr(node, "workeroutput", {})
    if "gpu_deselected" in output:
        node.config.stash[_deselected] = tuple(output["gpu_deselected"])


def pytest_terminal_summary(terminalreporter, config):
    count, reason = config.stash.get(_deselected, (0, ""))
    if count:
        terminalreporter.section("GPU tests not run", yellow=True)
        terminalreporter.line(
            f"{count} tests marked gpu were deselected: {reason}. "
            "On a machine with a GPU run tests/gpu/run_gpu_tests.sh"
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_deselected"] = session.config.stash.get(
            _deselected, (0, "")
        )
        return
    if not session.config.getoption("--require-gpu"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        reporter.line("")
        reporter.line(f"--require-gpu: {len(skipped)} tests were skipped, which fails this run")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
