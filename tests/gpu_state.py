"""Whether a process still has a usable GPU: after an illegal access it never has again."""

import jax


def gpu_works() -> bool:
    """Whether this process can compute on a CUDA device."""
    try:
        jax.block_until_ready(jax.device_put(1.0, jax.devices("cuda")[0]) + 1)
    except RuntimeError:
        return False
    return True


def end_run_if_lost(item, report) -> None:
    """Ends the run with a failed GPU test after which every later one would fail as well."""
    if report.failed and item.get_closest_marker("gpu") and not gpu_works():
        item.session.shouldfail = f"the GPU is lost to this process since {item.nodeid}"
