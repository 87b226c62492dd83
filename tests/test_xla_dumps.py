"""The reader of XLA's dumps, which only tests on a GPU can use in earnest."""

import pytest
from xla_dumps import Thunks, count_thunks, thunk_dump

# As XLA writes them: a thunk a line, those of a command buffer or loop further to the right.
BEFORE = """001: kCustomCall\t
002: kKernel    \t, kernel = wrapped_add
003: kCustomCall\t
"""
AFTER = """000: kKernel        \t, kernel = kCustomCall
010: kCommandBuffer \t
    001: kCustomCall\t
    002: kKernel    \t

003: kWhile         \t
  condition:
    004: kKernel    \t
  body:
    005: kCommandBuffer\t
        006: kCustomCall\t

    007: kCustomCall\t
008: kCustomCall    \t
"""


def test_counts_of_thunks():
    assert count_thunks(BEFORE, "kCustomCall") == Thunks(0, 2, 0)
    assert count_thunks(AFTER, "kCustomCall") == Thunks(2, 2, 2)
    assert count_thunks(AFTER, "kKernel") == Thunks(1, 2, 2)
    assert count_thunks("", "kKernel") == Thunks()


def test_the_dump_is_of_what_is_executed(tmp_path):
    with pytest.raises(AssertionError, match="no thunks among"):
        thunk_dump(tmp_path)
    (tmp_path / "module_0001.jit_step.thunk_sequence.txt").write_text(BEFORE)
    assert thunk_dump(tmp_path) == BEFORE
    (tmp_path / "module_0001.jit_step.thunk_sequence_after_thunk_passes.txt").write_text(AFTER)
    assert thunk_dump(tmp_path) == AFTER
    (tmp_path / "module_0002.jit_step.thunk_sequence_after_thunk_passes.txt").write_text(AFTER)
    with pytest.raises(AssertionError, match="module_0002"):
        thunk_dump(tmp_path)
