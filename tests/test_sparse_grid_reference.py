"""The grid of sparse decode without a GPU: its inputs, its reference and what it refuses.

XLA takes the place of the kernels, on small cases; everything else is as on a GPU.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import sparse_cases

sys.path.append(str(Path(__file__).parent / "gpu"))

import sparse_grid  # noqa: E402

from jax_flashmla.cache import PagedKVCache  # noqa: E402
from jax_flashmla.decode import flash_mla_with_kvcache  # noqa: E402

SIZES = sparse_grid.Sizes(
    slots=4096,
    extra_slots=2048,
    entries=3 * 2 * 70,
    extra_entries=3 * 2 * 46,
    query_rows=100,
    out_rows=64,
    partial_rows=8,
    requests=4,
    parts=8,
    items=4,
)


class OnXla(sparse_grid.Runner):
    """``spoil`` changes the results of the first launch, ``again`` those of the second."""

    spoil = again = staticmethod(lambda out, lse: (out, lse))

    def host(self, case, source, index):
        """The arrays of a source as the public function takes them."""
        words = np.asarray(source.cache)
        data = words.view(np.uint8)
        if case.cache_format == "fp8_v32":
            data = data[: source.pages * source.page_size]
            data = data.reshape(source.pages, source.page_size, 1, 656)
        count = case.b * case.s_q * source.topk
        indices = np.asarray(source.indices)[:count].reshape(case.b, case.s_q, source.topk)
        assert (np.asarray(source.indices)[count:] == 2147480000).all()
        lengths = source.host_lengths
        self.seen[index] = data, indices, lengths
        cache = PagedKVCache(jnp.asarray(data), case.cache_format, source.page_size)
        return cache, indices, lengths

    def launch(self, case, sources, sinks, first_query):
        self.seen = {}
        rows = case.b * case.s_q * case.h_q
        q = self.queries[first_query : first_query + rows]
        q = q.reshape(case.b, case.s_q, case.h_q, case.d)
        cache, indices, lengths = self.host(case, sources[0], 0)
        extra = {}
        if len(sources) > 1:
            names = ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length")
            extra = dict(zip(names, self.host(case, sources[1], 1), strict=True))
        out, lse = flash_mla_with_kvcache(
            q,
            cache,
            None,
            None,
            512,
            softmax_scale=case.softmax_scale,
            is_fp8_kvcache=True,
            indices=indices,
            topk_length=lengths,
            attn_sink=None if sinks is None else sinks[: case.h_q],
            **extra,
        )
        self.case, self.q, self.sinks = case, q, sinks
        out, lse = np.asarray(out).reshape(rows, 512), np.asarray(lse).reshape(rows)
        self.got, results = (out, lse), []
        for change in (self.spoil, self.again):
            changed = change(out.copy(), lse.copy())
            rest = SIZES.out_rows - rows
            results.append(
                tuple(
                    jnp.asarray(np.concatenate([x, np.full((rest, *x.shape[1:]), np.nan, x.dtype)]))
                    for x in changed
                )
            )
        return results


@pytest.fixture(scope="module", params=["fp8_v32", "fp8_v4"])
def runner(request):
    return OnXla(request.param, SIZES)


def case(runner, mode="both", **changes):
    options = {"page_size": 53, "b": 3, "s_q": 2, "topk": 70, "s_k": 300, "h_q": 3, "extra": True}
    return sparse_cases.GridCase(runner.cache_format, mode=mode, **options | changes)


@pytest.mark.parametrize("mode", sparse_cases.MODES)
def test_reference_agrees_with_xla_and_the_oracle(runner, mode):
    chosen = case(runner, mode, page_size=61 if mode == "bare" else 53, extra=mode != "sink")
    outcome = runner.run(chosen)
    assert outcome.failures == []
    # The bytes that were launched are what the independent oracle sees too.
    caches = []
    for index, (data, _, _) in runner.seen.items():
        page_size = chosen.extra_page_size if index else chosen.page_size
        if chosen.cache_format == "fp8_v32":
            caches.append(oracle.decode_v32(data))
        else:
            caches.append(oracle.decode_v4(data, page_size))
        # What nobody attends to is NaN, and only that.
        slots = len(caches[-1]) * page_size
        used = np.zeros(slots, bool)
        _, indices, lengths = runner.seen[index]
        counts = (indices >= 0) & (indices < slots)
        if lengths is not None:
            counts &= np.arange(indices.shape[-1]) < lengths[:, None, None]
        used[indices[counts]] = True
        nan = np.isnan(caches[-1].reshape(slots, -1))
        assert (nan.any(axis=1) == ~used).all() and (nan.all(axis=1) == ~used).all()
        if mode == "invalid":
            assert not used.any()
        else:
            assert 0 < used.sum() < slots
    caches = [x.astype(oracle.BFLOAT16) for x in caches]
    extra = {}
    if len(caches) > 1:
        extra = {
            "extra_k_cache": caches[1],
            "extra_indices": runner.seen[1][1],
            "extra_topk_length": runner.seen[1][2],
        }
    want = oracle.sparse_decode(
        np.asarray(runner.q),
        caches[0],
        runner.seen[0][1],
        512,
        softmax_scale=chosen.softmax_scale,
        topk_length=runner.seen[0][2],
        attn_sink=None if runner.sinks is None else np.asarray(runner.sinks)[: chosen.h_q],
        **extra,
    )
    shape = (chosen.b, chosen.s_q, chosen.h_q)
    out, lse = runner.got
    oracle.check("sparse_decode", "out", out.reshape(*shape, 512), want[0])
    oracle.check("sparse_decode", "lse", lse.reshape(shape[0], shape[2], shape[1]), want[1])
    assert np.isposinf(lse).any() == (mode in ("empty", "invalid"))


def test_requests_have_tokens_of_their_own(runner):
    chosen = case(runner, "bare", extra=False)
    runner.run(chosen)
    _, indices, _ = runner.seen[0]
    pages = [set((x[(x >= 0) & (x < 4081)] // 53).tolist()) for x in indices]
    assert all(pages) and not pages[0] & pages[1] and not pages[1] & pages[2]
    assert all(len(x) <= 6 for x in pages)  # 300 tokens


@pytest.mark.parametrize(
    "change,failure",
    [
        (lambda out, lse: (with_value(out, (5, 7), out[5, 7] + 1), lse), "out: 1 elements"),
        (lambda out, lse: (with_value(out, (0, 0), np.nan), lse), "out: 1 elements"),
        (lambda out, lse: (out, with_value(lse, 4, lse[4] * 1.001)), "lse: 1 elements"),
        (lambda out, lse: (out * out.dtype.type(1.01), lse), "out_cos"),
    ],
    ids=["element", "nan", "lse", "all"],
)
def test_wrong_results_are_refused(runner, monkeypatch, change, failure):
    monkeypatch.setattr(runner, "spoil", change)
    monkeypatch.setattr(runner, "again", change)
    failures = runner.run(case(runner, "bare")).failures
    assert any(failure in text for text in failures), failures


def test_other_bits_and_writes_past_the_end_are_refused(runner, monkeypatch):
    monkeypatch.setattr(runner, "again", lambda out, lse: (with_value(out, (1, 1), 0), lse))
    (failure,) = runner.run(case(runner, "bare")).failures
    assert "1 elements with other bits" in failure
    monkeypatch.undo()
    launch = runner.launch

    def past_the_end(*arguments):
        return [(out.at[20, 3].set(0), lse) for out, lse in launch(*arguments)]

    monkeypatch.setattr(runner, "launch", past_the_end)
    (failure,) = runner.run(case(runner, "bare")).failures
    assert "1 elements were written past the results" in failure


def with_value(array, at, value):
    array[at] = value
    return array


@pytest.mark.parametrize(
    "changes,what",
    [
        ({"b": 5, "topk": 10}, "5 requests"),
        ({"s_k": 2000, "b": 3, "topk": 10}, "pages"),
        ({"topk": 71}, "entries of indices"),
        ({"h_q": 12}, "72 results"),
    ],
)
def test_cases_that_do_not_fit_are_errors(runner, changes, what):
    with pytest.raises(ValueError, match=what):
        runner.run(case(runner, **changes))


def test_cases_of_the_grid_fit():
    sizes = sparse_grid.Sizes()
    for point in sparse_cases.grid():
        for page_size, topk, s_k, slots, entries in (
            (point.page_size, point.topk, point.s_k, sizes.slots, sizes.entries),
            (
                point.extra_page_size,
                point.extra_topk,
                point.extra_s_k,
                sizes.extra_slots,
                sizes.extra_entries,
            ),
        ):
            assert point.b * -(-s_k // page_size) <= slots // page_size, point.name
            assert point.b * point.s_q * topk <= entries
        assert point.b * point.s_q * point.h_q < min(sizes.out_rows, sizes.query_rows)


def test_scales_are_of_every_kind(runner):
    """V3.2's are no powers of two; the numbers are those of the bits."""
    pool = {name: np.asarray(x) for name, x in runner.pools[0].items()}
    if runner.cache_format == "fp8_v32":
        mantissa = np.frexp(pool["scales"].view(np.float32))[0]
        assert (mantissa != 0.5).mean() > 0.99
        exact = oracle.decode_v32(pool["numbers"].view(np.uint8))
    else:
        page = np.concatenate([pool["numbers"].view(np.uint8), pool["scales"].view(np.uint8)], 1)
        rest = np.zeros((len(page), oracle.v4_page_bytes(1) - page.shape[1]), np.uint8)
        exact = oracle.decode_v4(np.concatenate([page, rest], axis=1), 1)[:, 0, 0]
    values = pool["values"].astype(np.float64)
    assert np.isfinite(values).all() and 0.09 < values.std() < 0.11
    # Rounded to bfloat16, from a product that float32 has rounded before.
    np.testing.assert_allclose(values, exact, rtol=2**-8, atol=1e-30)
    rounded = exact.astype(oracle.BFLOAT16).astype(np.float64)
    assert (values == rounded).mean() > 0.999
