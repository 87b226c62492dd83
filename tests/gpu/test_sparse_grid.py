"""A subset of the peer's grid of sparse decode that has every pair of its values.

See sparse_grid.py, which runs all of it.
"""

import pytest
import sparse_cases
import sparse_grid

# In one process when there are several: each would have its own large caches.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("sparse_grid")]


@pytest.fixture(scope="module")
def runners():
    return sparse_grid.Runners()


@pytest.mark.parametrize("case", sparse_cases.grid_pairwise(), ids=lambda case: case.name)
def test_pairwise_subset_of_the_grid(runners, case):
    outcome = runners.run(case)
    assert not outcome.failures, f"{case.name}: {'; '.join(outcome.failures)}"
