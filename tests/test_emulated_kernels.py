"""CUDA sources emulated on the CPU under sanitizers: the scheduler, the merge, attention.

So is the walk over a schedule, which the attention kernels do. Values are checked against the
planner in jnp and a merge in float64. The same kernels are tested on GPUs (tests/gpu); here no GPU
is needed, and shared memory holds garbage when a CTA starts.
"""

import dataclasses
import functools
import os

import cases
import fp8_oracle
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_cases
from cases import DenseCase, SparseCase
from emulator import SANITIZERS, Emulator, compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashmla.reference import scheduler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 or later")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The emulator with a sanitizer, compiled once for all processes of pytest-xdist."""
    builds = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        builds = builds.parent
    return functools.cache(lambda name: Emulator(tmp_path_factory.mktemp(name), name, builds))


@pytest.fixture(params=SANITIZERS)
def emulator(request, built):
    return built(request.param)


# Threads of a kernel that is led astray may write the same word, whichever of their values counts.
only_memory = pytest.mark.parametrize("emulator", ["memory"], indirect=True)


# ------------------------------------------------------------------ scheduler


def lengths_of(b, mean):
    lengths = np.random.default_rng(b).normal(mean, mean, b).astype(np.int32)
    lengths[b // 2] = -3
    return lengths


@pytest.mark.parametrize(
    "lengths, parts, row_tiles",
    [
        (np.int32([512]), 132, 1),
        (np.int32([16384]), 66, 2),
        (np.int32([2048] * 4), 66, 2),
        (lengths_of(33, 3000), 132, 1),  # cut, not evenly
        (lengths_of(128, 900), 66, 4),  # whole requests
        (lengths_of(7, 90_000), 1, 40),
        (lengths_of(1500, 300), 13, 1),  # more than small_schedule_kernel plans
        (lengths_of(3, 90_000), 1100, 1),
    ],
    ids=lambda x: f"{len(x)}-requests" if isinstance(x, np.ndarray) else str(x),
)
@pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "invariant"])
def test_scheduler_gives_the_integers_of_the_reference(
    emulator, lengths, parts, row_tiles, batch_invariant
):
    b = len(lengths)
    rows, splits = np.full((parts, 8), -1, np.int32), np.full(b + 1, -1, np.int32)
    emulator.run(
        "plan",
        {"lengths": lengths, "schedule": rows, "num_splits": splits},
        batch=b,
        num_parts=parts,
        row_tiles=row_tiles,
        batch_invariant=batch_invariant,
    )
    want = scheduler.metadata(
        {"cache_seqlens": jnp.asarray(lengths)},
        batch_size=b,
        row_tiles=row_tiles,
        topk=None,
        extra_topk=None,
        num_sm_parts=parts,
        batch_invariant=batch_invariant,
    )
    np.testing.assert_array_equal(rows, want[0])
    np.testing.assert_array_equal(splits, want[1])


# ------------------------------------------------------------------ walk

CAPACITY = 1 << 14
LENGTHS = st.one_of(
    st.integers(-2, 700), st.integers(0, CAPACITY), st.sampled_from([0, CAPACITY, CAPACITY + 1])
)


def blocks_of(length):
    """Blocks of a request; one stands for those of a length past the capacity."""
    return 1 if length > CAPACITY else -(-max(int(length), 0) // 64)


@given(
    data=st.data(),
    b=st.sampled_from([1, 4, 9]),
    parts=st.sampled_from([1, 3, 13]),
    batch_invariant=st.booleans(),
    change=st.sampled_from(["none", "a boundary", "a number", "a bit", "a row"]),
)
@settings(max_examples=150, deadline=None)
def test_a_schedule_is_a_partition_of_the_work_or_broken(
    built, data, b, parts, batch_invariant, change
):
    """Whatever it holds, and for other lengths: no block is left out, none is done twice."""
    planned = data.draw(st.lists(LENGTHS, min_size=b, max_size=b), "planned")
    lengths = np.int32(data.draw(st.lists(LENGTHS, min_size=b, max_size=b), "lengths"))
    rows, _ = scheduler.metadata(
        {"cache_seqlens": jnp.asarray(planned, jnp.int32)},
        batch_size=b,
        row_tiles=2,
        topk=None,
        extra_topk=None,
        num_sm_parts=parts,
        batch_invariant=batch_invariant,
    )
    rows = np.array(rows)
    row, column = data.draw(st.tuples(st.integers(0, parts - 1), st.integers(0, 7)), "where")
    if change == "a boundary":  # of two neighbours only one has moved
        rows[row, data.draw(st.sampled_from([1, 3]))] = data.draw(st.integers(0, 12))
    elif change == "a number":
        rows[row, column] = data.draw(
            st.one_of(st.integers(-2, 20), st.integers(-(2**31), 2**31 - 1))
        )
    elif change == "a bit":
        rows[row, column] ^= 1 << data.draw(st.integers(0, 30))
    elif change == "a row":
        rows[row] = rows[data.draw(st.integers(0, parts - 1))]
    pieces, broken = np.zeros((32 * (b + parts), 9), np.int32), np.int32([-1])
    built("memory").run(
        "walk",
        {"lengths": lengths, "schedule": rows, "pieces": pieces, "is_broken": broken},
        batch=b,
        num_parts=parts,
        row_tiles=2,
        batch_invariant=batch_invariant,
        capacity=CAPACITY,
    )
    if broken[0]:
        assert change != "none"
        return
    pieces = pieces[pieces[:, 8] == 1]
    # Queries are loaded for the first piece of a request in a part, and freed after the last.
    place = pieces[:, :2]
    changes = (place[1:] != place[:-1]).any(axis=1)
    np.testing.assert_array_equal(pieces[:, 6], [True, *changes][: len(pieces)])
    np.testing.assert_array_equal(pieces[:, 7], [*changes, True][: len(pieces)])
    slots = pieces[pieces[:, 4] >= 0, 4]
    most = 16 * b if batch_invariant else 2 * parts
    assert len(set(slots.tolist())) == len(slots) and (slots < most).all()
    for request, length in enumerate(lengths):
        own = pieces[pieces[:, 1] == request]
        assert len(own) > 0 and (own[:, 5] == (length > CAPACITY)).all()
        done = [block for piece in own for block in range(piece[2], piece[3])]
        assert sorted(done) == list(range(blocks_of(length)))
        if (own[:, 4] < 0).any():  # it writes the result itself
            assert len(own) == 1


# ------------------------------------------------------------------ merge

UNTOUCHED = 0xABAB


def in_slabs(x, rounded):
    """Rows [slots, slices, rows, n] as csrc/common/partial_results.h has them, with NaN to fill.

    Of values, or of maximum and sum, with axes (group, c) for lanes before the last if rounded.
    """
    slots, slices, rows, *axes = x.shape
    filled = np.full((slots, slices, -(-rows // 16) * 16, *axes), np.nan, x.dtype)
    filled[:, :, :rows] = x
    x = filled.reshape(slots, slices, -1, 2, 8, *axes)  # rows of a slab: half, line
    if axes[-1] > 2 and rounded:  # columns: pair of tiles, tile, lane of the line, column
        x = x.reshape(*x.shape[:5], -1, 2, 4, 2).transpose(0, 1, 2, 5, 4, 7, 6, 3, 8)
    elif axes[-1] > 2:  # tile, lane of the line, column
        x = x.reshape(*x.shape[:5], -1, 4, 2).transpose(0, 1, 2, 5, 4, 6, 3, 7)
    elif rounded:
        x = x.transpose(0, 1, 2, 5, 4, 6, 3, 7)
    else:
        x = x.swapaxes(3, 4)
    return np.ascontiguousarray(x.reshape(*x.shape[:3], -1))


class Merge:
    """Random pieces of requests: ``pieces[r]`` of request r, each in a part of its own."""

    def __init__(
        self,
        pieces,
        parts,
        h_q,
        h_kv=1,
        s_q=1,
        dv=512,
        sink=False,
        seed=0,
        batch_invariant=False,
        sparse=False,
        dtype=np.float16,
        rounded=True,
        groups=2,
    ):
        self.dtype, self.rounded, self.groups = np.dtype(dtype), rounded, groups
        self.pieces, self.parts, self.h_q, self.h_kv, self.s_q = pieces, parts, h_q, h_kv, s_q
        self.batch_invariant, self.sparse = batch_invariant, sparse
        self.num_slots = 16 * len(pieces) if batch_invariant else 2 * parts
        slices = s_q if sparse else h_kv
        b, rows, rng = len(pieces), s_q * h_q // slices, np.random.default_rng(seed)
        begins = [(r, 3 * k) for r, count in enumerate(pieces) for k in range(count)]
        assert len(begins) <= parts
        begins += [(b, 0)] * (parts + 1 - len(begins))
        schedule = [[*begins[i], *begins[i + 1], b, 1, 0, parts] for i in range(parts)]
        self.arrays = {
            "schedule": np.int32(schedule),
            # Batch-invariant pieces have eight blocks.
            "lengths": np.int32([8 * 64 * count for count in pieces]),
            "attn_sink": rng.normal(size=h_q).astype(np.float32) if sink else None,
            "schedule_is_broken": np.zeros(1, np.int32),
            "out": np.full((b, s_q, h_q, dv), UNTOUCHED, np.uint16),
            "lse": np.full((b, h_q, s_q), -777, np.float32),
        }
        shape = (self.num_slots, slices, rows)
        self.values = rng.normal(size=(*shape, dv)).astype(np.float32)
        self.max = rng.normal(0, 5, shape).astype(np.float32)
        self.sum = np.exp(rng.normal(0, 2, shape)).astype(np.float32)
        # Pieces without a token leave their output as it was.
        empty = rng.random(shape) < 0.1
        self.max[empty], self.sum[empty], self.values[empty] = -np.inf, 0, np.nan
        self.store()

    def store(self):
        """The pieces as they lie in the workspace; ``values`` become what they are rounded to."""
        sums = np.stack([self.max, self.sum], axis=-1)
        if not self.rounded:
            self.arrays["partial_out"] = in_slabs(self.values, False)
            sums = in_slabs(sums, False)
            rest = np.full((*sums.shape[:3], 1024 - sums.shape[3]), np.nan, np.float32)
            self.arrays["partial_sums"] = np.concatenate([sums, rest], axis=-1)
            return
        # Each lane has a scale of its own for each row and group of columns.
        rng = np.random.default_rng(1)
        *rows, dv = self.values.shape
        exponent = rng.integers(-9, 10, (*rows, self.groups, 4)).astype(np.float32)
        column = np.arange(dv)
        scale = np.exp2(exponent)[..., column // (dv // self.groups), column % 8 // 2]
        stored = (self.values / scale).astype(np.float16)
        self.values = stored.astype(np.float32) * scale
        sums = np.broadcast_to(sums[..., None, None, :], (*exponent.shape, 2)).copy()
        sums[..., 0] += exponent
        sums[..., 1] *= np.exp2(-exponent)
        self.arrays["partial_out"] = in_slabs(stored, True)
        self.arrays["partial_sums"] = in_slabs(sums, True)

    def run(self, emulator):
        b, s_q, h_q, dv = self.arrays["out"].shape
        emulator.run(
            "merge",
            self.arrays,
            batch=b,
            seq_q=s_q,
            heads_q=h_q,
            heads_kv=self.h_kv,
            head_dim_v=dv,
            num_parts=self.parts,
            num_slots=self.num_slots,
            batch_invariant=self.batch_invariant,
            sparse=self.sparse,
            capacity=CAPACITY,
            is_fp16=self.dtype == np.float16,
            format=FORMATS[
                "fp8_v32" if not self.rounded else "plain" if self.groups == 2 else "fp8_v4"
            ],
        )
        return self.arrays["out"], self.arrays["lse"]

    def slots(self, request):
        """Where the pieces are: the first one is its part's last piece, the others the first."""
        if self.batch_invariant:
            return 16 * request + np.arange(self.pieces[request])
        first = sum(self.pieces[:request])
        parts = np.arange(first, first + self.pieces[request])
        return 2 * parts + (parts == first)

    def expected(self, request):
        """out [slices, rows, dv] and lse [slices, rows] in float64."""
        slots = self.slots(request)
        maximum, row_sum = self.max[slots].astype(np.float64), self.sum[slots].astype(np.float64)
        with np.errstate(divide="ignore"):
            lse = maximum + np.log2(row_sum)
        total = np.logaddexp2.reduce(lse)
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = np.where(lse == -np.inf, 0, np.exp2(lse - total))
            out = self.values[slots].astype(np.float64) / row_sum[..., None]
        merged = np.where(weights[..., None] == 0, 0, weights[..., None] * out).sum(axis=0)
        natural = np.where(total == -np.inf, np.inf, total * np.log(2))
        if self.arrays["attn_sink"] is not None:
            sink = self.arrays["attn_sink"].astype(np.float64)
            if not self.sparse:
                sink = np.tile(sink.reshape(self.h_kv, -1), (1, self.s_q))  # query tokens x heads
            with np.errstate(over="ignore"):
                merged /= 1 + np.exp(sink - natural)[..., None]
        return merged, natural

    def by_rows(self, x, request):
        """A result of a request as [slices, rows, ...]."""
        x = x[request]  # [s_q, h_q, dv] or, lse, [h_q, s_q]
        x = x.T if x.ndim == 2 else x
        if self.sparse:
            return x
        x = x.reshape(self.s_q, self.h_kv, -1, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(self.h_kv, -1, *x.shape[3:])


def case(*sizes, **options):
    """A merge to be made anew by each test: its arrays are large, and the kernel writes to them."""
    return functools.partial(Merge, *sizes, **options)


# The launcher takes as many CTAs for a slab of rows as can run at once: so many warps share the
# pieces of a slab, each for so many tiles of 8 columns. Parts without work count.
MERGES = {
    "8 warps, a tile each": case([132], 132, 2),
    "8 warps, a tile each, KV heads": case([33], 132, 34, h_kv=2, sink=True),
    "8 warps, a tile each, sparse": case([12], 13, 5, s_q=2, sink=True, sparse=True),
    "8 warps, a tile each, 256": case([17], 20, 3, dv=256),
    "8 warps, 2 tiles each": case([13], 20, 40, sink=True),
    "8 warps, 2 tiles each, 256": case([13], 20, 70, dv=256, sink=True),
    "8 warps, 4 tiles each": case([36, 3], 40, 129, dv=256, sink=True),
    "4 warps": case([7, 1, 8], 24, 66),
    "2 warps": case([3, 4, 1, 2] * 3, 32, 48, dv=256, sink=True),
    "a warp, 4 tiles": case([2] * 23 + [1, 3], 52, 48, dv=256),
    "a warp, 4 tiles, sparse": case([2, 1, 3] * 15, 90, 7, s_q=2, sink=True, sparse=True),
    "a warp, 8 tiles": case([2, 1, 1, 3] * 9, 66, 63, h_kv=3, sink=True),
    "batch-invariant": case([16, 1, 3], 20, 3, sink=True, batch_invariant=True),
    "batch-invariant, a warp": case([3, 16, 9, 1, 5], 34, 128, sink=True, batch_invariant=True),
    "by parts": case([1, 1, 0, 1, 2, 1, 0, 1, 1, 0, 0, 1], 9, 2),
}


# The type of the results, and whether the pieces are rounded. What is not is bfloat16, with 512
# columns.
FORMS = pytest.mark.parametrize(
    "form",
    [
        {"dtype": np.float16},
        {"dtype": cases.BFLOAT16},
        {"dtype": cases.BFLOAT16, "rounded": False},
    ],
    ids=["float16", "bfloat16", "float"],
)


# Every case with results in float16, the more exact type, and some in the other forms.
MERGES_IN_FORMS = {
    **{name: (name, {"dtype": np.float16}) for name in MERGES},
    **{
        f"{name}, bfloat16": (name, {"dtype": cases.BFLOAT16})
        for name in ("8 warps, a tile each", "4 warps", "batch-invariant, a warp")
    },
    **{
        f"{name}, float": (name, {"dtype": cases.BFLOAT16, "rounded": False})
        for name in MERGES
        if "256" not in name and name not in ("8 warps, 4 tiles each", "2 warps", "a warp, 4 tiles")
    },
    # Of FP8 caches, with more than 32 rows.
    "4 warps, FP8": ("4 warps", {"dtype": cases.BFLOAT16, "groups": 8}),
}


@pytest.mark.parametrize("name, form", MERGES_IN_FORMS.values(), ids=MERGES_IN_FORMS)
def test_merge_is_the_weighted_sum_of_pieces(emulator, name, form):
    merge = MERGES[name](**form)
    out, lse = merge.run(emulator)
    for request, count in enumerate(merge.pieces):
        if count < 2:  # the attention kernel's business
            assert (out[request] == UNTOUCHED).all() and (lse[request] == -777).all()
            continue
        want_out, want_lse = merge.expected(request)
        got = merge.by_rows(out.view(merge.dtype), request).astype(np.float64)
        rtol = 1e-3 if merge.dtype == np.float16 else 4e-3
        np.testing.assert_allclose(got, want_out, rtol=rtol, atol=1e-4)
        np.testing.assert_allclose(merge.by_rows(lse, request), want_lse, rtol=1e-5, atol=1e-5)


@FORMS
@pytest.mark.parametrize(
    "name", ["8 warps, a tile each", "8 warps, 2 tiles each", "a warp, 8 tiles", "by parts"]
)
def test_infinite_values_of_a_piece_without_weight_make_nan(emulator, name, form):
    merge = MERGES[name](**form)
    request = next(r for r, count in enumerate(merge.pieces) if count > 1)
    light, heavy = merge.slots(request)[:2]
    merge.max[heavy], merge.sum[heavy] = 0, 1
    merge.max[light], merge.sum[light] = -400, 1
    merge.values[[light, heavy]] = 1
    merge.values[light, ..., 3] = np.inf
    merge.store()
    out, _ = merge.run(emulator)
    nan = np.isnan(merge.by_rows(out.view(merge.dtype), request))
    assert nan[..., 3].all() and nan.sum() == nan[..., 3].size


@only_memory
@FORMS
@pytest.mark.parametrize("pieces", [5, 16])
def test_batch_invariant_merge_is_the_same_however_it_is_shared(emulator, pieces, form):
    """Alone the four runs of pieces have a warp each, of a batch one warp takes all of them."""
    alone = Merge([pieces], 16, 128, sink=True, batch_invariant=True, **form)
    want = [x[0].copy() for x in alone.run(emulator)]
    assert not (want[0] == UNTOUCHED).all()
    for b in (2, 3, 5):
        batch = Merge(
            [2] * (b - 1) + [pieces], 16 + 2 * b, 128, sink=True, batch_invariant=True, **form
        )
        batch.arrays["attn_sink"] = alone.arrays["attn_sink"]
        for name in ("partial_out", "partial_sums"):
            batch.arrays[name][16 * (b - 1) :] = alone.arrays[name]
        out, lse = batch.run(emulator)
        np.testing.assert_array_equal(out[-1], want[0])
        np.testing.assert_array_equal(lse[-1], want[1])


@only_memory
@pytest.mark.parametrize(
    "name",
    ["8 warps, a tile each, sparse", "2 warps", "a warp, 8 tiles", "batch-invariant", "by parts"],
)
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_merged_by_a_broken_schedule(emulator, name, seed):
    merge = MERGES[name](seed=seed)
    rng = np.random.default_rng(seed)
    shape, info = merge.arrays["schedule"].shape, np.iinfo(np.int32)
    noise = [rng.integers(info.min, info.max, shape), rng.integers(-2, 5, shape)]
    merge.arrays["schedule"] = noise[seed % 2].astype(np.int32)
    merge.arrays["schedule_is_broken"][:] = 1
    out, lse = merge.run(emulator)
    assert (out == UNTOUCHED).all() and (lse == -777).all()


# ------------------------------------------------------------------ decode


FORMATS = {"plain": 0, "fp8_v32": 1, "fp8_v4": 2}


def decode(
    emulator,
    inputs,
    parts,
    fp8_matmul=False,
    sign=1,
    late_copies=0,
    promise=False,
    invariant_parts=None,
):
    """``(out, lse)`` of dense or sparse decode: plan, attention, merge. ``sign``: of the scale.

    ``late_copies``: each so many-th copy comes as late as it can, the last of them first.
    ``promise``: that scales are powers of two. ``invariant_parts``: where parts begin, (request,
    unit) each, of a schedule with ``batch_invariant``.
    """
    case, sparse = inputs.case, isinstance(inputs.case, SparseCase)
    b, s_q, h_q, d = inputs.q.shape
    h_kv = 1 if sparse else case.h_kv
    slices = s_q if sparse else h_kv
    rows = s_q * h_q // slices
    slots = 2 * parts if invariant_parts is None else 16 * b
    slabs = slots * slices * -(-rows // 16)
    numbers = {
        "batch": b,
        "num_parts": parts,
        "row_tiles": slices * -(-rows // 64),
        "batch_invariant": invariant_parts is not None,
        "sparse": sparse,
    }
    arrays = {"schedule": np.zeros((parts, 8), np.int32), "num_splits": np.zeros(b + 1, np.int32)}
    if sparse:
        cache, extra, cache_format = inputs.cache, inputs.extra_cache, case.cache_format
        arrays |= {"lengths": inputs.topk_length, "extra_lengths": inputs.extra_topk_length}
        numbers |= {"topk": case.topk, "extra_topk": 0 if extra is None else case.extra_topk}
    else:
        arrays |= {"lengths": inputs.cache_seqlens, "extra_lengths": None}
    emulator.run("plan", arrays, **numbers)
    if invariant_parts is not None:
        begins = np.int32([*invariant_parts, (b, 0)])
        arrays["schedule"][:, :4] = np.concatenate([begins[:-1], begins[1:]], axis=1)
    if sparse:
        arrays |= {
            "k_cache": cache.data,
            "table": inputs.indices,
            "extra_k_cache": None if extra is None else extra.data,
            "extra_table": inputs.extra_indices,
        }
        numbers |= {
            "num_pages": len(cache.data),
            "page_size": case.page_size,
            "extra_num_pages": 0 if extra is None else len(extra.data),
            "extra_page_size": case.extra_page_size,
            "capacity": case.topk,
        }
    else:
        is_fp8 = isinstance(inputs, sparse_cases.Fp8DenseInputs)
        cache_format = "fp8_v32" if is_fp8 else "plain"
        width = inputs.block_table.shape[-1]
        arrays |= {
            "k_cache": inputs.data if is_fp8 else inputs.k_cache,
            "table": inputs.block_table,
            "extra_k_cache": None,
            "extra_table": None,
        }
        numbers |= {
            "num_pages": len(inputs.k_cache),
            "page_size": case.page_size,
            "table_width": width,
            "capacity": width * case.page_size,
            "causal": case.causal,
        }
    arrays |= {
        "q": inputs.q,
        "attn_sink": inputs.attn_sink,
        "out": np.full((b, s_q, h_q, 512), -777, cases.BFLOAT16),
        "lse": np.full((b, h_q, s_q), -777, np.float32),
        "partial_out": np.full((slabs, 16 * 512), np.nan, np.float32),
        "partial_sums": np.full(
            (slabs, 256 if cache_format == "plain" else 1024), np.nan, np.float32
        ),
        "schedule_is_broken": np.zeros(1, np.int32),
    }
    emulator.run(
        "decode",
        arrays,
        seq_q=s_q,
        heads_q=h_q,
        heads_kv=h_kv,
        head_dim=d,
        head_dim_v=512,
        num_slots=slots,
        format=FORMATS[cache_format],
        fp8_matmul=fp8_matmul,
        power_of_two_scales=promise,
        late_copies=late_copies,
        softmax_scale=np.float32(sign * case.softmax_scale).view(np.int32),
        **numbers,
    )
    return arrays["out"], arrays["lse"]


def dense_case(h_q, lengths=(270, 0, 65), **options):
    """Whole requests and cut ones, an empty one, several in a part."""
    options = {"s_q": 2, "page_size": 16, "causal": True} | options
    return DenseCase(
        f"emulated-{h_q}", len(lengths), 0, h_q, lengths=lengths, attn_sink=True, **options
    )


def fp8_dense(h_q, scales, **options):
    return sparse_cases.build_fp8_dense(dense_case(h_q, **options), scales=scales)


def sparse(h_q, cache_format="fp8_v32", b=2, topk=150, **options):
    """Choices that are none, lengths, a partial block."""
    options = {"s_q": 2, "slots": 305, "page_size": 61, "topk_length": True} | options
    options |= {"cache_format": cache_format, "d": sparse_cases.DIMS[cache_format]}
    return cases.build_sparse(
        SparseCase(f"emulated-{h_q}", b, topk, h_q, attn_sink=True, **options)
    )


EXTRA = {"extra_topk": 70, "extra_slots": 130, "extra_page_size": 2, "extra_topk_length": True}
# Inputs, and parts of the schedule.
DECODES = {
    "dense": (lambda: cases.build(dense_case(33)), 2),
    "dense, KV heads": (lambda: cases.build(dense_case(6, h_kv=2, page_size=64)), 2),
    "dense, a part": (lambda: cases.build(dense_case(16, s_q=1, scores="rising")), 1),
    "FP8 dense, 16 rows": (lambda: fp8_dense(8, "power"), 2),
    "FP8 dense, 16 rows, any scales": (lambda: fp8_dense(3, "arbitrary", scores="rising"), 2),
    "FP8 dense, 32 rows": (lambda: fp8_dense(16, "power", page_size=53), 2),
    "FP8 dense, 32 rows, any scales": (lambda: fp8_dense(11, "arbitrary"), 2),
    "FP8 dense, a part": (lambda: fp8_dense(16, "power", s_q=1, page_size=64), 1),
    "sparse V3.2, 16 rows": (lambda: sparse(5, scales="arbitrary"), 3),
    "sparse V3.2, 32 rows": (lambda: sparse(20, **EXTRA), 3),
    "sparse V4, 16 rows": (lambda: sparse(7, "fp8_v4", page_size=1, **EXTRA), 3),
    "sparse V4, 32 rows": (lambda: sparse(20, "fp8_v4", **EXTRA), 3),
    "sparse V4": (lambda: sparse(40, "fp8_v4", **EXTRA), 3),
    "sparse plain": (lambda: sparse(20, "plain", **EXTRA), 3),
}
# Those with the promise of simple scales.
PROMISES = {
    "FP8 dense": (lambda: fp8_dense(33, "power", page_size=53), 2),
    "FP8 dense, a part": (
        lambda: fp8_dense(40, "power", s_q=1, page_size=64, scores="rising"),
        1,
    ),
    "sparse V3.2": (lambda: sparse(40, **EXTRA), 3),
    "sparse V3.2, row tiles": (lambda: sparse(70, page_size=1, **EXTRA), 3),
}
FP8_PRODUCTS = {
    "dense": (lambda: fp8_dense(20, "arbitrary"), 2),
    "dense, a part": (
        lambda: fp8_dense(40, "power", s_q=1, page_size=64, scores="rising"),
        1,
    ),
    "dense, row tiles": (lambda: fp8_dense(35, "arbitrary", page_size=53), 3),
    "sparse": (lambda: sparse(40, scales="arbitrary", **EXTRA), 3),
}


def check_decode(emulator, name, promise=False):
    build, parts = (PROMISES if promise else DECODES)[name]
    inputs = build()
    op = "sparse_decode" if name.startswith("sparse") else "dense_decode"
    oracle.check_decode(op, inputs, decode(emulator, inputs, parts, promise=promise))


def check_fp8_products(emulator, name):
    build, parts = FP8_PRODUCTS[name]
    inputs = build()
    check_products(inputs, decode(emulator, inputs, parts, fp8_matmul=True))


def check_products(inputs, got):
    is_sparse = isinstance(inputs.case, SparseCase)
    model = fp8_oracle.sparse_decode if is_sparse else fp8_oracle.dense_decode
    fp8_oracle.check(model(inputs), got, inputs.case.name)


@only_memory
@pytest.mark.parametrize("name", DECODES)
def test_decode_agrees_with_the_oracle(emulator, name):
    check_decode(emulator, name)


@only_memory
@pytest.mark.parametrize("name", PROMISES)
def test_power_of_two_scales(emulator, name):
    check_decode(emulator, name, promise=True)


@only_memory
@pytest.mark.parametrize("sign", [-1, 0])
@pytest.mark.parametrize(
    "name, promise",
    [
        ("dense", False),
        ("FP8 dense, 16 rows", False),
        ("FP8 dense, 32 rows, any scales", False),
        ("sparse V4", False),
        ("sparse V3.2", True),
        ("sparse plain", False),
    ],
)
def test_a_scale_that_is_not_positive(emulator, name, promise, sign):
    """A negative scale is as good as negative queries, and 0 as queries of zeros."""
    build, parts = (PROMISES if promise else DECODES)[name]
    inputs = build()
    op = "sparse_decode" if name.startswith("sparse") else "dense_decode"
    same = dataclasses.replace(inputs, q=(sign * inputs.q).astype(cases.BFLOAT16))
    oracle.check_decode(op, same, decode(emulator, inputs, parts, sign=sign, promise=promise))


@only_memory
@pytest.mark.parametrize(
    "h_q, options", [(16, {}), (40, {"promise": True}), (40, {"fp8_matmul": True})]
)
def test_bad_lengths_and_pages(emulator, h_q, options):
    """Requests that cannot be served are NaN, and no others."""
    inputs = fp8_dense(h_q, "power", s_q=1, page_size=64, lengths=(400, 70, 250, 0))
    inputs.cache_seqlens[3] = -3
    inputs.cache_seqlens[1] = inputs.block_table.shape[1] * 64 + 1
    inputs.block_table[2, 1] = len(inputs.data)
    out, lse = decode(emulator, inputs, 1, **options)
    for bad in (1, 2):
        assert np.isnan(out[bad].astype(np.float32)).all() and np.isnan(lse[bad]).all()
    if "fp8_matmul" in options:
        return check_products(inputs, (out, lse))
    inputs.cache_seqlens[1:] = 0
    want = inputs.expected()
    for x, y, name in zip((out, lse), want, ("out", "lse"), strict=True):
        oracle.check("dense_decode", name, x[[0, 3]], y[[0, 3]])


@only_memory
@pytest.mark.parametrize("token", [3, 200])
def test_other_scales_than_promised_make_nan(emulator, token):
    inputs = fp8_dense(40, "power", s_q=1, page_size=64, lengths=(400, 70, 250))
    right = decode(emulator, inputs, 2, promise=True)
    data = inputs.data.copy()
    page = inputs.block_table[0, token // 64]
    data[page, token % 64].reshape(-1)[512:516].view(np.float32)[:] *= 1.5
    out, lse = decode(emulator, inputs.with_data(data), 2, promise=True)
    assert np.isnan(out[0].astype(np.float32)).all() and np.isnan(lse[0]).all()
    for x, want in zip((out, lse), right, strict=True):
        np.testing.assert_array_equal(x[1:].view(np.uint8), want[1:].view(np.uint8))


@only_memory
@pytest.mark.parametrize("low,high", sparse_cases.V4_SCALES)
@pytest.mark.parametrize("h_q", [16, 40])
def test_v4_scales_of_any_size(emulator, low, high, h_q):
    """Also in pieces in float16, which keep tiles however much smaller they are."""
    inputs = sparse(h_q, "fp8_v4", s_q=1, invalid=0.0)
    inputs = sparse_cases.with_scales(inputs, sparse_cases.v4_scales(low, high))
    parts = 2 if h_q == 16 else 5
    sparse_cases.check_by_tiles(decode(emulator, inputs, parts), inputs.expected())


@only_memory
@pytest.mark.parametrize(
    "h_q, scales, promise", [(16, "power", False), (16, "arbitrary", False), (48, "power", True)]
)
def test_queries_of_any_size(emulator, h_q, scales, promise):
    """Power-of-two scales are where queries become fp16. A row that is not finite is NaN alone."""
    inputs = fp8_dense(h_q, scales, s_q=1)
    q = inputs.q.astype(np.float32)
    q *= np.exp2(np.linspace(-120, 6, h_q, dtype=np.float32))[:, None]
    q[:, :, 1, :512] = 0  # RoPE columns alone,
    q[:, :, 2, :512] *= np.float32(2) ** -10  # RoPE columns far larger,
    q[:, :, 3, 512:] = 0  # and none
    q[:, :, 2, 512:] *= np.float32(2) ** 95
    q[0, 0, 4, 5], q[0, 0, 6, 570] = np.nan, np.inf
    inputs = dataclasses.replace(inputs, q=q.astype(cases.BFLOAT16))
    out, lse = inputs.expected()
    got = decode(emulator, inputs, 2, promise=promise)
    oracle.check_norm("dense_decode", "out", got[0], out)
    oracle.check_norm("dense_decode", "lse", got[1], lse, bound=1e-5)


@only_memory
@pytest.mark.parametrize("name", FP8_PRODUCTS)
def test_fp8_products_agree_with_their_oracle(emulator, name):
    check_fp8_products(emulator, name)


@only_memory
def test_fp8_products_with_scales_that_are_far_apart(emulator):
    """Scores are summed up in units of a scale, which may be 0 or far below another."""
    inputs = fp8_dense(40, "arbitrary", s_q=1, lengths=(90, 150))
    data = inputs.data.copy()
    scales = data.reshape(-1, 656)[:, 512:528]
    factors = np.float32([[1, 0, 1, 2], [0, 0, 0, 0], [2.0**-60, 1, 2.0**-39, 1], [1, 1, 1, 0]])
    was = np.ascontiguousarray(scales).view(np.float32)
    scales[:] = (was * np.resize(factors, was.shape)).view(np.uint8)
    inputs = inputs.with_data(data)
    check_products(inputs, decode(emulator, inputs, 2, fp8_matmul=True))


@only_memory
@pytest.mark.parametrize("second", [(1, 0), (1, 5), (2, 0)])
def test_fp8_products_of_any_batch_invariant_partition(emulator, second):
    """The second part may have nothing to do, though it begins inside a request."""
    inputs = fp8_dense(40, "arbitrary", s_q=1, lengths=(64, 129))
    got = decode(emulator, inputs, 2, fp8_matmul=True, invariant_parts=[(0, 0), second])
    check_products(inputs, got)


def cut_dense(scale=1.0):
    """A request cut into pieces, with weights that are all alike, and values times ``scale``."""
    inputs = cases.build(dense_case(16, (700,), s_q=1, page_size=64))
    cache = (inputs.k_cache.astype(np.float32) * np.float32(scale)).astype(cases.BFLOAT16)
    return dataclasses.replace(inputs, q=np.zeros_like(inputs.q), k_cache=cache)


@only_memory
@pytest.mark.parametrize("exponent", [-55, -20, 15, 115])
def test_pieces_of_large_and_small_values(emulator, exponent):
    """Exactly as much larger or smaller as the values are: pieces are scaled to fit."""
    want, want_lse = decode(emulator, cut_dense(), 5)
    scale = 2.0**exponent
    got, lse = decode(emulator, cut_dense(scale), 5)
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64) * scale)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


@only_memory
def test_nan_in_a_column_of_a_piece_stays_there(emulator):
    """A token of infinite distance has no weight, but 0 x inf is NaN, in one column of a piece."""
    inputs = cut_dense()
    q, cache = inputs.q.copy(), inputs.k_cache.copy()
    q[..., 7] = 1
    cache[..., 7] = 0
    cache[inputs.block_table[0, 1], 5, 0, 7] = -np.inf
    inputs = dataclasses.replace(inputs, q=q, k_cache=cache, attn_sink=None)
    got, lse = decode(emulator, inputs, 5)
    assert np.isnan(got[..., 7].astype(np.float64)).all()
    tokens = cache[inputs.block_table[0, :11]].reshape(-1, 576)[:700].astype(np.float64)
    want = np.delete(tokens, 64 + 5, axis=0)[:, :512].mean(axis=0)
    others = np.arange(512) != 7
    for row in got[0, 0].astype(np.float64):
        np.testing.assert_allclose(row[others], want[others], rtol=8e-3, atol=1e-4)
    np.testing.assert_allclose(lse, np.log(699), rtol=1e-6)


# Requests of three or two batch-invariant pieces and of one.
INVARIANT = {
    "dense": lambda: cases.build(dense_case(33, (1030, 0, 90), s_q=1)),
    "dense, KV heads": lambda: cases.build(dense_case(6, (550, 0, 90), h_kv=2, page_size=64)),
    "sparse V4": lambda: sparse(40, "fp8_v4", topk=500, s_q=1, **EXTRA),
    "sparse plain": lambda: sparse(20, "plain", topk=550, s_q=1),
}


def check_invariant(emulator, name, parts):
    inputs = INVARIANT[name]()
    op = "sparse_decode" if name.startswith("sparse") else "dense_decode"
    got = decode(emulator, inputs, len(parts), invariant_parts=parts)
    oracle.check_decode(op, inputs, got)


@only_memory
@pytest.mark.parametrize("parts", [[(0, 0)], [(0, 0), (0, 1)]], ids=["a part", "cut"])
@pytest.mark.parametrize("name", INVARIANT)
def test_pieces_of_a_request_in_one_part(emulator, name, parts):
    """Their queries stay where they are."""
    check_invariant(emulator, name, parts)


@pytest.mark.parametrize("emulator", ["races"], indirect=True)
@pytest.mark.parametrize("name", ["dense", "sparse V4"])
def test_pieces_of_a_request_in_one_part_have_no_races(emulator, name):
    check_invariant(emulator, name, [(0, 0), (0, 1)])


@pytest.mark.parametrize("emulator", ["races"], indirect=True)
@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "FP8 dense, 16 rows",
        "sparse V3.2, 32 rows",
        "sparse V4, 16 rows",
        "sparse V4",
        "sparse plain",
    ],
)
def test_decode_has_no_races(emulator, name):
    check_decode(emulator, name)


# A part with more blocks than there is room for.
LONG = {
    "dense": lambda: cases.build(dense_case(16, (700, 90), s_q=1, page_size=64)),
    "FP8 dense, 16 rows": lambda: fp8_dense(8, "power", lengths=(1000, 90), page_size=64),
    "FP8 dense, 32 rows": lambda: fp8_dense(16, "power", lengths=(800, 90), page_size=64),
    "sparse V3.2, 16 rows": lambda: sparse(16, b=1, topk=900, s_q=1),
    "sparse V4, 32 rows": lambda: sparse(20, "fp8_v4", b=1, topk=700, s_q=1),
    "FP8 dense, promise": lambda: fp8_dense(20, "power", lengths=(700, 90), page_size=64),
    "sparse V3.2, promise": lambda: sparse(40, b=1, topk=600, s_q=1),
    "FP8 dense, products": lambda: fp8_dense(20, "arbitrary", lengths=(700, 90), page_size=64),
    "sparse V3.2, products": lambda: sparse(40, b=1, topk=600, s_q=1, scales="arbitrary"),
}


@only_memory
@pytest.mark.parametrize("name", LONG)
def test_copies_that_come_late(emulator, name):
    inputs = LONG[name]()
    op = "sparse_decode" if name.startswith("sparse") else "dense_decode"
    period = 61 if name.startswith("sparse") else 3
    options = {"promise": name.endswith("promise"), "fp8_matmul": name.endswith("products")}
    got = decode(emulator, inputs, 1, late_copies=period, **options)
    if options["fp8_matmul"]:
        check_products(inputs, got)
    else:
        oracle.check_decode(op, inputs, got)


@pytest.mark.parametrize("emulator", ["races"], indirect=True)
@pytest.mark.parametrize("name", ["FP8 dense", "sparse V3.2"])
def test_power_of_two_scales_have_no_races(emulator, name):
    check_decode(emulator, name, promise=True)


@pytest.mark.parametrize("emulator", ["races"], indirect=True)
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_fp8_products_have_no_races(emulator, name):
    check_fp8_products(emulator, name)
