"""A GPU test that leaves its process without a usable GPU ends the run, and no other test does."""

from types import SimpleNamespace

import gpu_state
import jax
import pytest


@pytest.mark.parametrize(
    "failed, marked, works, ends",
    [
        (True, True, False, True),
        (True, True, True, False),
        (True, False, False, False),
        (False, True, False, False),
    ],
)
def test_run_ends_with_the_test_that_loses_the_gpu(monkeypatch, failed, marked, works, ends):
    monkeypatch.setattr(gpu_state, "gpu_works", lambda: works)
    session = SimpleNamespace(shouldfail=False)
    item = SimpleNamespace(
        nodeid="tests/test_x.py::test_y",
        session=session,
        get_closest_marker=lambda name: marked and name == "gpu",
    )
    gpu_state.end_run_if_lost(item, SimpleNamespace(failed=failed))
    assert bool(session.shouldfail) == ends
    assert not ends or "tests/test_x.py::test_y" in session.shouldfail


def test_gpu_works_where_there_is_one():
    assert gpu_state.gpu_works() == (jax.default_backend() == "gpu")
