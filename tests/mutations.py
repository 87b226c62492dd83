"""Seeded bugs, and the program that runs tests against a copy of the package with one of them.

Used by test_mutations.py. ``python -P mutations.py FOLDER REPORT TESTS...`` runs the tests with the
package of FOLDER. It exits as pytest does, and leaves in REPORT, as JSON, how many tests passed,
why others failed, and the files that the package was imported from.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import sys
from pathlib import Path

PACKAGE = "jax_flashmla"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` replaced by ``new`` in ``file`` of the package, and a test that catches it.

    ``old`` must occur exactly once in the file. Of the tests that fail, ``test`` is a cheap one.
    """

    name: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, package: Path) -> None:
        """Puts the bug into the package at this path."""
        path = package / self.file
        text = path.read_text(encoding="utf-8")
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {found} times in {self.file}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


ONLINE_SOFTMAX = "reference/online_softmax.py"
DECODE = "reference/decode.py"
SPARSE = "reference/sparse.py"
VARLEN = "reference/varlen.py"
SCHEDULER = "reference/scheduler.py"

MUTATIONS = (
    # ---------------------------------------------------------------- softmax over blocks
    Mutation(
        "the accumulator is not rescaled when the maximum moves",
        ONLINE_SOFTMAX,
        "state.weighted * rescale[..., None] + weigh(",
        "state.weighted + weigh(",
        "test_dense_decode.py::test_any_chunks_and_blocks[1]",
    ),
    Mutation(
        "attn_sink is ignored",
        ONLINE_SOFTMAX,
        "out = out * jax.nn.sigmoid(lse - sink)[..., None]",
        "out = out * 1.0",
        "test_dense_decode.py::test_attn_sink",
    ),
    Mutation(
        "lse in base 2",
        ONLINE_SOFTMAX,
        "state.maximum + jnp.log(state.total)",
        "(state.maximum + jnp.log(state.total)) / jnp.log(2.0)",
        "test_sparse_prefill.py::test_nothing_to_attend_to",
    ),
    Mutation(
        "lse -inf where there is nothing to attend to",
        ONLINE_SOFTMAX,
        "jnp.log(state.total), jnp.inf)",
        "jnp.log(state.total), -jnp.inf)",
        "test_dense_decode.py::test_small_problem_agrees_with_oracle",
    ),
    Mutation(
        "probabilities are not rounded to the input type",
        ONLINE_SOFTMAX,
        "weigh(round_to(probabilities, dtype))",
        "weigh(probabilities)",
        "test_dense_decode.py::test_probabilities_are_rounded_to_the_input_type[bfloat16]",
    ),
    # ---------------------------------------------------------------- dense decode
    Mutation(
        "the last block is dropped if it is not full",
        DECODE,
        "blocks = longest // tokens + (longest % tokens > 0)",
        "blocks = longest // tokens",
        "test_dense_decode.py::test_small_problem_agrees_with_oracle",
    ),
    Mutation(
        "the causal border is off by one",
        DECODE,
        "ends - (s_q - 1 - jnp.arange(rows, dtype=jnp.int32) // group)",
        "ends - (s_q - jnp.arange(rows, dtype=jnp.int32) // group)",
        "test_dense_decode.py::test_small_problem_agrees_with_oracle",
    ),
    Mutation(
        "values of slots past the length are not zeroed",
        DECODE,
        "keys = jnp.where(inside[:, :, None, None], keys, 0.0)",
        "keys = keys",
        "test_dense_decode.py::test_unused_slots_never_leak[nan-False]",
    ),
    Mutation(
        "a length past the table is served",
        DECODE,
        "broken = (used_pages > columns) | jnp.any(",
        "broken = jnp.any(",
        "test_dense_decode.py::test_length_past_the_table_is_nan",
    ),
    Mutation(
        "a schedule for another call is accepted",
        SCHEDULER,
        "valid = jnp.all(tile_scheduler_metadata[:, 4:] == marks)",
        "valid = marks[3] == parts",
        "test_dense_decode.py::test_foreign_schedules_give_nan[row tiles]",
    ),
    # ---------------------------------------------------------------- sparse decode and prefill
    Mutation(
        "topk_length is ignored",
        SPARSE,
        "valid &= jnp.arange(indices.shape[1], dtype=jnp.int32) < length[:, None]",
        "valid &= True",
        "test_sparse_decode.py::test_entries_after_the_length_never_count",
    ),
    Mutation(
        "only negative indices are invalid",
        SPARSE,
        "valid = (indices >= 0) & (indices <= min(source.slots - 1, _INT32_MAX))",
        "valid = indices >= 0",
        "test_sparse_prefill.py::test_invalid_indices_are_skipped[20]",
    ),
    Mutation(
        "values of invalid slots are not zeroed",
        SPARSE,
        "jnp.where(valid[..., None], load(jnp.maximum(slots, 0)), 0.0)",
        "load(jnp.maximum(slots, 0))",
        "test_sparse_decode.py::test_unused_slots_never_leak[nan]",
    ),
    Mutation(
        "the workspace of sparse decode is made for choices, not for the blocks they fill",
        "_cuda.py",
        "return blocks * scheduler.BLOCK",
        "return topk + (extra_topk or 0)",
        "test_sparse_decode.py::test_batch_invariant_workspace_has_room_for_all_pieces[500-1]",
    ),
    # ---------------------------------------------------------------- caches
    Mutation(
        "scales of two tiles are swapped (V3.2)",
        "quantization.py",
        "_float32_bits(values * scale[..., None])",
        "_float32_bits(values * scale[..., np.array([1, 0, 2, 3]), None])",
        "test_quantization.py::test_v32_every_code_times_arbitrary_scales[float32]",
    ),
    Mutation(
        "scales are taken for powers of two (V3.2)",
        "quantization.py",
        "_float32_bits(values * scale[..., None])",
        "_float32_bits(values * jnp.exp2(jnp.floor(jnp.log2(scale)))[..., None])",
        "test_sparse_decode.py::test_agrees_with_oracle[v32-arbitrary]",
    ),
    Mutation(
        "scales of two tiles are swapped (V4)",
        "quantization.py",
        "scales[..., : fmt.tiles].astype(jnp.int32)[..., None]",
        "scales[..., np.array([0, 1, 2, 3, 4, 6, 5])].astype(jnp.int32)[..., None]",
        "test_sparse_decode.py::test_agrees_with_oracle[v4]",
    ),
    Mutation(
        "append writes negative slots",
        "cache.py",
        "return page, offset, (slots >= 0) & (page < num_pages)",
        "return page, offset, page < num_pages",
        "test_cache.py::test_append[plain-False]",
    ),
    # ---------------------------------------------------------------- schedules
    Mutation(
        "a part ends where its last request was planned to end",
        SCHEDULER,
        "jnp.stack([request[:-1], unit[:-1], request[1:], unit[1:]], axis=1)",
        "jnp.stack([request[:-1], unit[:-1], request[1:] - (unit[1:] == 0), "
        "jnp.where(unit[1:] == 0, jnp.append(blocks, 0)[request[1:] - 1], unit[1:])], axis=1)",
        "test_metadata.py::test_each_block_is_covered_once_whatever_the_lengths_are_now",
    ),
    Mutation(
        "a part begins a block before the end of the one before",
        SCHEDULER,
        "jnp.stack([request[:-1], unit[:-1], request[1:], unit[1:]], axis=1)",
        "jnp.stack([request[:-1], jnp.maximum(unit[:-1] - 1, 0), request[1:], unit[1:]], axis=1)",
        "test_metadata.py::test_each_block_is_covered_once_whatever_the_lengths_are_now",
    ),
    # ---------------------------------------------------------------- varlen attention
    Mutation(
        "the causal border is off by one (varlen)",
        VARLEN,
        "jnp.clip(k_end - q_end + q_rows + 1, k_begin, k_end)",
        "jnp.clip(k_end - q_end + q_rows, k_begin, k_end)",
        "test_varlen.py::test_one_key_head",
    ),
    Mutation(
        "the gradient of lse is left out",
        VARLEN,
        "out.astype(jnp.float32), axis=-1) - dlse",
        "out.astype(jnp.float32), axis=-1)",
        "test_varlen.py::test_gradient_of_lse_alone",
    ),
    Mutation(
        "dk is not summed over the query heads of its group",
        VARLEN,
        '_dot("hrqk,qhrd->khd", dscores, taken["q"])',
        '_dot("hqk,qhd->khd", dscores[:, 0], taken["q"][:, :, 0])',
        "test_varlen.py::test_one_key_head",
    ),
    Mutation(
        "dv is not summed over the query heads of its group",
        VARLEN,
        '_dot("hrqk,qhre->khe", probs, taken["dout"])',
        '_dot("hqk,qhe->khe", probs[:, 0], taken["dout"][:, :, 0])',
        "test_varlen.py::test_one_key_head",
    ),
    # ---------------------------------------------------------------- vmap
    Mutation(
        "vmap adds offsets to numbers that are no page",
        "_folding.py",
        "return jnp.where(valid, entries + offsets, -1)",
        "return entries + offsets",
        "test_transforms.py::test_used_table_entries_that_are_no_page_stay_so_when_folded",
    ),
    Mutation(
        "vmap hands sinks to the wrong requests",
        "_folding.py",
        "return jnp.repeat(sink, b, axis=0)",
        "return jnp.tile(sink, (b, 1))",
        "test_transforms.py::test_vmap_of_dense_decode[attn_sink]",
    ),
)


class _Finder:
    """Finds the package in one folder, whatever is on the path or installed as editable."""

    def __init__(self, folder: str):
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        if name == PACKAGE:
            return importlib.machinery.PathFinder.find_spec(name, [self.folder])
        if name.startswith(PACKAGE + "."):
            return importlib.machinery.PathFinder.find_spec(name, path)
        return None


class _Recorder:
    """A pytest plugin that counts what passed and notes why tests failed."""

    def __init__(self):
        self.passed = 0
        self.failures = []

    def pytest_configure(self):
        import hypothesis

        # The same examples each time, none of them remembered or minimised.
        hypothesis.settings.register_profile(
            "mutations",
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        )
        hypothesis.settings.load_profile("mutations")

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed

    def pytest_exception_interact(self, node, call, report):
        wrong_result = isinstance(call.excinfo.value, AssertionError)
        self.failures.append([node.nodeid, "AssertionError" if wrong_result else repr(call)])


def main(folder: str, report: str, *tests: str) -> int:
    """Runs the tests, returns pytest's exit code."""
    sys.meta_path.insert(0, _Finder(folder))
    import pytest

    recorder = _Recorder()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[recorder])
    modules = {n: m for n, m in sys.modules.items() if n == PACKAGE or n.startswith(PACKAGE + ".")}
    result = {
        "passed": recorder.passed,
        "failures": recorder.failures,
        "files": sorted(m.__file__ for n, m in modules.items() if not n.endswith("._ext")),
    }
    Path(report).write_text(json.dumps(result), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
