"""The pieces of a serving loop: pages, step arrays, and attention through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from test_cache import DTYPES, assert_in_place, copies_of_the_cache, make

from jax_flashmla import (
    PagedKVCache,
    flash_attn_varlen_func,
    flash_mla_with_kvcache,
    get_mla_metadata,
    merge_attention_states,
    serving,
    slot_mapping,
)
from jax_flashmla.serving import OutOfPagesError, PageAllocator, page_copies

F32 = jnp.float32
INT_MAX = 2**31 - 1


def i32(values):
    return np.asarray(values, np.int32)


# --- the allocator, one thing at a time ---


def test_life_of_a_request():
    pages = PageAllocator(6, 4)
    pages.allocate("a", 5)
    assert pages.pages("a") == (0, 1) and pages.tokens("a") == 5 and "a" in pages
    pages.grow("a", 3)  # fits
    assert pages.pages("a") == (0, 1)
    pages.grow("a")
    assert pages.pages("a") == (0, 1, 2) and pages.tokens("a") == 9
    pages.allocate("empty", 0)
    assert pages.pages("empty") == () and pages.requests == ("a", "empty")
    np.testing.assert_array_equal(pages.slots("a", 3), [3, 4, 5, 6, 7, 8])
    assert (pages.free_pages, pages.used_pages, pages.shared_pages) == (3, 3, 0)
    pages.free("a")
    assert "a" not in pages and pages.free_pages == 6
    pages.allocate("b", 12)
    assert pages.pages("b") == (0, 1, 2)  # used last, used first
    assert "2 requests, 3 pages used, 0 of them shared, 3 free" in repr(pages)


def test_fork():
    pages = PageAllocator(8, 4)
    pages.allocate("a", 10)
    assert pages.fork("whole", "a") == [(2, 3)]
    assert pages.pages("whole") == (0, 1, 3) and pages.tokens("whole") == 10
    assert pages.fork("aligned", "a", 8) == []
    assert pages.fork("inside a full page", "a", 6) == [(1, 4)]
    assert pages.fork("nothing", "a", 0) == [] and pages.pages("nothing") == ()
    assert (pages.shared_pages, pages.used_pages) == (2, 5)
    pages.grow("aligned")
    assert pages.pages("aligned") == (0, 1, 5)  # not page 2
    pages.free("a")  # page 2 was its own
    assert pages.free_pages == 3 and pages.shared_pages == 2
    pages.free("whole")
    pages.free("inside a full page")
    assert pages.pages("aligned") == (0, 1, 5) and pages.shared_pages == 0
    pages.free("aligned")
    assert pages.free_pages == 8


def test_truncate():
    pages = PageAllocator(6, 4)
    pages.allocate("a", 10)
    assert pages.truncate("a", 9) == [] and pages.pages("a") == (0, 1, 2)
    pages.fork("b", "a", 8)
    assert pages.truncate("a", 7) == [(1, 2)]  # page 1 is b's too; page 2 was just dropped
    assert pages.pages("a") == (0, 2) and pages.pages("b") == (0, 1) and pages.shared_pages == 1
    assert pages.truncate("b", 4) == [] and pages.pages("b") == (0,)
    assert pages.truncate("a", 0) == [] and pages.pages("a") == () and pages.used_pages == 1
    full = PageAllocator(3, 4)
    full.allocate("a", 8)
    full.fork("b", "a")
    full.grow("b", 4)
    assert full.free_pages == 0
    assert full.truncate("b", 7) == [(1, 2)]  # the page that it drops is enough for the copy
    full = PageAllocator(1, 4)
    full.allocate("a", 4)
    full.fork("b", "a")
    before = snapshot(full)
    with pytest.raises(OutOfPagesError, match="'b' needs 1 more pages"):
        full.truncate("b", 3)
    assert snapshot(full) == before


def snapshot(pages):
    requests = {
        request: (pages.tokens(request), pages.pages(request)) for request in pages.requests
    }
    return requests, pages.free_pages, pages.shared_pages, list(pages._free), list(pages._owners)


@pytest.mark.parametrize(
    "call,needed",
    [
        (lambda pages: pages.allocate("b", 5), 2),
        (lambda pages: pages.grow("a", 9), 3),
        (lambda pages: pages.fork("b", "full", 3), 1),
    ],
)
def test_out_of_pages_changes_nothing(call, needed):
    pages = PageAllocator(4, 4)
    pages.allocate("a", 4)
    pages.allocate("full", 8)
    if needed == 1:
        pages.grow("a", 4)
    before = snapshot(pages)
    with pytest.raises(OutOfPagesError, match=r"^PageAllocator\.\w+: request '\w+' needs") as info:
        call(pages)
    assert (info.value.needed, info.value.free) == (needed, pages.free_pages)
    assert snapshot(pages) == before


def allocator():
    pages = PageAllocator(4, 4)
    pages.allocate("a", 5)
    return pages


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda p: PageAllocator(-1), "PageAllocator: argument 'num_pages' is -1"),
        (lambda p: PageAllocator(2, 0), "'page_size' is 0"),
        (lambda p: PageAllocator(2**25, 64), "'num_pages' is 33554432 with pages of 64 tokens"),
        (lambda p: p.allocate("a", 1), "'request' is 'a', which exists already"),
        (lambda p: p.allocate(None, 1), "'request' is None"),
        (lambda p: p.allocate("b", -1), r"PageAllocator.allocate: argument 'tokens' is -1"),
        (lambda p: p.allocate("b", 1.0), "'tokens' is 1.0 of type float"),
        (lambda p: p.grow("b"), "'request' is 'b'; expected one of the 1 requests"),
        (lambda p: p.grow("a", -1), "'tokens' is -1"),
        (lambda p: p.free("b"), "PageAllocator.free: argument 'request' is 'b'"),
        (lambda p: p.fork("b", "c"), "PageAllocator.fork: argument 'source' is 'c'"),
        (lambda p: p.fork("a", "a"), "'request' is 'a', which exists"),
        (lambda p: p.fork("b", "a", 6), "'tokens' is 6; expected at most 5, the tokens of"),
        (lambda p: p.truncate("a", 6), "PageAllocator.truncate: argument 'tokens' is 6"),
        (lambda p: p.tokens("b"), "PageAllocator.tokens: argument 'request' is 'b'"),
        (lambda p: p.pages("b"), "PageAllocator.pages: argument 'request' is 'b'"),
        (lambda p: p.block_table(["a", "b"]), "block_table: argument 'requests' is 'b'"),
        (lambda p: p.block_table(["a"], 1), "'width' is 1; expected at least 2, since request 'a'"),
        (lambda p: p.cache_seqlens(["b"]), "cache_seqlens: argument 'requests' is 'b'"),
        (lambda p: p.slots("a", 0, 6), "'stop' is 6; expected at most 5"),
        (lambda p: p.slots("a", 4, 3), "'start' is 4; expected at most stop=3"),
        (lambda p: p.slots("a", -1), "'start' is -1"),
        (lambda p: p.slot_mapping(["a"], [6]), "has 6 for request 'a'; expected at most its 5"),
        (lambda p: p.slot_mapping(["a"], [1, 2]), "'new_tokens' has 2 entries"),
        (lambda p: p.slot_mapping([None], [1]), "has 1 for request None"),
        (lambda p: p.slot_mapping(["a"], [3], 2), "'size' is 2; expected at least the 3 new"),
        (lambda p: page_copies([(0, 1), (1, 2)], 1), "'size' is 1; expected at least 2"),
        (lambda p: serving.cu_seqlens([1, -1]), "cu_seqlens: argument 'lengths'"),
        (lambda p: serving.cu_seqlens([1.5]), "cu_seqlens: argument 'lengths'"),
        (lambda p: serving.cu_seqlens([2**30, 2**30]), "has sum 2147483648"),
    ],
)
def test_bad_calls_of_the_host(call, text):
    pages = allocator()
    before = snapshot(pages)
    with pytest.raises(ValueError, match=text):
        call(pages)
    assert snapshot(pages) == before


def test_arrays_of_a_batch():
    pages = PageAllocator(10, 4)
    pages.allocate("a", 9)
    pages.allocate("b", 3)
    batch = ["b", None, "a"]
    table = pages.block_table(batch, 4)
    assert table.dtype == np.int32
    np.testing.assert_array_equal(table, [[3, -1, -1, -1], [-1] * 4, [0, 1, 2, -1]])
    assert pages.block_table(batch).shape == (3, 3) and pages.block_table([]).shape == (0, 0)
    np.testing.assert_array_equal(pages.cache_seqlens(batch), i32([3, 0, 9]))
    assert pages.cache_seqlens([]).dtype == np.int32
    mapping = pages.slot_mapping(batch, [2, 0, 3], size=8)
    assert mapping.dtype == np.int32
    np.testing.assert_array_equal(mapping, [13, 14, 6, 7, 8, -1, -1, -1])
    np.testing.assert_array_equal(pages.slot_mapping(batch, i32([2, 0, 3])), mapping[:5])
    assert pages.slot_mapping([], []).shape == (0,) and pages.slots("a", 9).shape == (0,)
    limits = serving.cu_seqlens([2, 0, 3])
    assert limits.dtype == np.int32 and limits.tolist() == [0, 2, 2, 5]
    assert serving.cu_seqlens([]).tolist() == [0]
    # As the device computes them.
    positions, ids = i32([1, 2, 6, 7, 8]), i32([0, 0, 2, 2, 2])
    on_device = slot_mapping(table, positions, 4, request_ids=ids, num_pages=10)
    np.testing.assert_array_equal(on_device, mapping[:5])


# --- the allocator, against a model ---

NAMES = st.integers(0, 5)
NUM_PAGES, PAGE = 7, 3


class Serving(RuleBasedStateMachine):
    """Requests as plain lists of tokens, beside a pool of memory that the allocator manages.

    Whatever happens, each request must find its own tokens in its slots. Copies are collected and
    made when something is written next, as in a serving loop.
    """

    @initialize()
    def start(self):
        self.pages, self.twin = PageAllocator(NUM_PAGES, PAGE), PageAllocator(NUM_PAGES, PAGE)
        self.memory = np.full((NUM_PAGES, PAGE), -1)
        self.contents: dict[int, list[int]] = {}
        self.pending: list[tuple[int, int]] = []
        self.next_token = 0

    def call(self, name, *arguments, needed, errors):
        """Calls both allocators; whether there were enough pages must be as the model says."""
        before = snapshot(self.pages)
        results = []
        for pages in (self.pages, self.twin):
            try:
                results.append(getattr(pages, name)(*arguments))
            except (OutOfPagesError, ValueError) as error:
                results.append(type(error))
        assert results[0] == results[1]
        if errors:
            expected = ValueError
        elif needed > before[1]:
            expected = OutOfPagesError
        else:
            assert results[0] not in (OutOfPagesError, ValueError)
            return True, results[0]
        assert results[0] is expected and snapshot(self.pages) == before
        return False, None

    def write(self, request, count):
        sources, targets = page_copies(self.pending, size=NUM_PAGES)
        real = targets >= 0
        self.memory[targets[real]] = self.memory[sources[real]]  # all read before any is written
        self.pending = []
        start = len(self.contents[request])
        new = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        self.contents[request] += new
        self.memory.reshape(-1)[self.pages.slots(request, start, start + count)] = new

    def pages_of(self, tokens):
        return (tokens + PAGE - 1) // PAGE

    @rule(request=NAMES, tokens=st.integers(0, 9))
    def allocate(self, request, tokens):
        known = request in self.contents
        needed = self.pages_of(tokens)
        done, _ = self.call("allocate", request, tokens, needed=needed, errors=known)
        if done:
            self.contents[request] = []
            self.write(request, tokens)

    @rule(request=NAMES, tokens=st.integers(0, 5))
    def grow(self, request, tokens):
        known = request in self.contents
        length = len(self.contents.get(request, ()))
        needed = self.pages_of(length + tokens) - self.pages_of(length)
        done, _ = self.call("grow", request, tokens, needed=needed, errors=not known)
        if done:
            self.write(request, tokens)

    @rule(request=NAMES, source=NAMES, tokens=st.integers(0, 12))
    def fork(self, request, source, tokens):
        length = len(self.contents.get(source, ()))
        bad = request in self.contents or source not in self.contents
        tokens = min(tokens, length + 1)
        bad |= tokens > length
        needed = int(tokens % PAGE != 0)
        done, copies = self.call("fork", request, source, tokens, needed=needed, errors=bad)
        if done:
            assert len(copies) == needed
            self.pending += copies
            self.contents[request] = self.contents[source][:tokens]

    @rule(request=NAMES, tokens=st.integers(0, 12))
    def truncate(self, request, tokens):
        length = len(self.contents.get(request, ()))
        tokens = min(tokens, length + 1)
        bad = request not in self.contents or tokens > length
        needed = 0
        if not bad and tokens % PAGE:
            owners = self.owners()
            owned = self.pages.pages(request)
            kept = self.pages_of(tokens)
            dropped = sum(owners[page] == 1 for page in owned[kept:])
            needed = max(0, int(owners[owned[kept - 1]] > 1) - dropped)
        done, copies = self.call("truncate", request, tokens, needed=needed, errors=bad)
        if done:
            self.pending += copies
            self.contents[request] = self.contents[request][:tokens]

    @rule(request=NAMES)
    def free(self, request):
        known = request in self.contents
        done, _ = self.call("free", request, needed=0, errors=not known)
        if done:
            del self.contents[request]

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def free_one_that_exists(self, data):
        self.free(data.draw(st.sampled_from(sorted(self.contents))))

    def owners(self):
        return np.bincount(
            [page for request in self.contents for page in self.pages.pages(request)],
            minlength=NUM_PAGES,
        )

    @invariant()
    def pages_are_accounted_for(self):
        assert list(self.pages.requests) == list(self.contents)
        owners = self.owners()
        assert self.pages.used_pages == (owners > 0).sum()
        assert self.pages.free_pages == (owners == 0).sum()
        assert self.pages.shared_pages == (owners > 1).sum()
        assert sorted(self.pages._free) == np.flatnonzero(owners == 0).tolist()
        for request, tokens in self.contents.items():
            pages = self.pages.pages(request)
            assert len(pages) == self.pages_of(len(tokens)) and len(set(pages)) == len(pages)
            assert pages == self.twin.pages(request)
            if len(tokens) % PAGE:
                assert owners[pages[-1]] == 1  # where it grows, it is alone

    @invariant()
    def requests_find_their_tokens(self):
        memory = self.memory.copy()
        for source, target in self.pending:  # one after the other, as they were asked for
            memory[target] = memory[source]
        for request, tokens in self.contents.items():
            assert memory.reshape(-1)[self.pages.slots(request)].tolist() == tokens


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# --- copying pages on the device ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=10))
def test_page_copies_in_order(copies):
    memory = list(range(6))
    for source, target in copies:
        memory[target] = memory[source]
    sources, targets = page_copies(copies, 8)
    got = np.arange(6)
    real = targets >= 0
    assert (real == (sources >= 0)).all() and len(set(targets[real])) == real.sum()
    got[targets[real]] = got[sources[real]]
    assert got.tolist() == memory


@pytest.mark.parametrize("format,dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 3])
def test_copy_pages(format, dtype, layers):
    cache = make(format, num_pages=layers * 5, page_size=4, dtype=dtype)
    bits = np.random.default_rng(0).integers(0, 100, cache.data.shape)
    cache = PagedKVCache(jnp.asarray(bits, cache.data.dtype), format, 4)
    before = np.asarray(jnp.copy(cache.data))  # an alias would keep it from being donated
    # A swap, what is padding, and what is no page of a layer.
    sources, targets = i32([0, 1, 4, -1, 2, 5, 2]), i32([1, 0, 3, 2, -1, 2, INT_MAX])
    copy = jax.jit(serving.copy_pages, donate_argnames="cache", static_argnames="num_pages")
    got = copy(cache, sources, targets, num_pages=5)
    assert (got.format, got.page_size) == (format, 4) and cache.data.is_deleted()
    want = before.reshape(layers, 5, *before.shape[1:])[:, [1, 0, 2, 4, 4]]
    np.testing.assert_array_equal(got.data, want.reshape(before.shape))


def test_copy_pages_without_work():
    cache = PagedKVCache.zeros(4, 2)
    assert serving.copy_pages(cache, i32([]), i32([])) is cache
    empty = PagedKVCache.zeros(0, 2)
    assert serving.copy_pages(empty, i32([0]), i32([1])) is empty


@pytest.mark.parametrize("format,dtype", DTYPES)
def test_donated_copy_is_in_place(format, dtype):
    cache = make(format, num_pages=64, page_size=64, dtype=dtype)
    arguments = cache, i32([3, -1]), i32([5, -1])

    def copy(cache, sources, targets):
        return serving.copy_pages(cache, sources, targets, num_pages=32)

    assert_in_place(jax.jit(copy, donate_argnums=0).lower(*arguments).compile(), cache)
    # The check can fail: without donation the copy is there.
    assert copies_of_the_cache(jax.jit(copy).lower(*arguments).compile(), cache)


# --- packed and batched ---


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_ragged_and_batched(data):
    lengths = data.draw(st.lists(st.integers(0, 5), max_size=4))
    before, after = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    s = data.draw(st.integers(0, 6))
    tail = data.draw(st.sampled_from([(), (2,)]))
    limits = before + serving.cu_seqlens(lengths)
    t = int(limits[-1]) + after
    x = np.arange(1, t * (2 if tail else 1) + 1, dtype=np.float32).reshape(t, *tail)
    batched = np.full((len(lengths), s, *tail), -7, np.float32)
    back = np.full((t, *tail), 9, np.float32)
    poisoned = x.copy()
    poisoned[: limits[0]] = poisoned[limits[-1] :] = np.nan
    for r, (start, stop) in enumerate(zip(limits[:-1], limits[1:], strict=True)):
        kept = min(stop - start, s)
        if kept:
            batched[r, s - kept :] = back[stop - kept : stop] = x[stop - kept : stop]
    got = serving.ragged_to_batched(poisoned, limits, s, fill=-7)
    np.testing.assert_array_equal(got, batched)
    padded = np.where(batched == -7, np.nan, batched)
    np.testing.assert_array_equal(serving.batched_to_ragged(padded, limits, t, fill=9), back)


def test_ragged_keeps_the_type_and_gradients():
    limits = i32([0, 2, 2, 5])
    slots = serving.ragged_to_batched(i32([4, 5, 6, 7, 8, 99]), limits, 3, fill=-1)
    assert slots.dtype == jnp.int32
    np.testing.assert_array_equal(slots, [[-1, 4, 5], [-1, -1, -1], [6, 7, 8]])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 2)), F32)

    @jax.jit
    @jax.grad
    def gradient(x, limits):
        batched = serving.ragged_to_batched(x, limits, 4)
        return (serving.batched_to_ragged(batched, limits, 7) ** 2).sum()

    np.testing.assert_allclose(gradient(x, limits), np.where(np.arange(7)[:, None] < 5, 2 * x, 0))


def test_new_token_positions():
    got = serving.new_token_positions(i32([7, 0, 2, 9]), i32([2, 0, 2, 5]), 3)
    np.testing.assert_array_equal(got, [[-1, 5, 6], [-1] * 3, [-1, 0, 1], [6, 7, 8]])
    # Nonsense cannot name a token that is not there.
    got = serving.new_token_positions(i32([1, -2]), i32([3, 2]), 3)
    np.testing.assert_array_equal(got, [[-1, -1, 0], [-1] * 3])


def test_speculative_decoding_equals_calls_for_each_request():
    """Different numbers of new tokens: one call with padding first, as one call a request."""
    rng = np.random.default_rng(1)
    h, d, dv, page, s = 3, 16, 12, 4, 4
    cached, new = i32([9, 3, 0, 5, 0]), i32([4, 1, 2, 0, 0])
    lengths, limits, total = cached + new, serving.cu_seqlens(new), 9
    kv = jnp.asarray(rng.standard_normal((5, 16, 1, d)), F32)
    cache, table = PagedKVCache.from_sequences(kv, page)
    q = rng.standard_normal((total, h, d)).astype(np.float32)
    q[limits[-1] :] = np.nan  # rows of no request

    @jax.jit
    def attend(q, cache, table, lengths, limits):
        batched = serving.ragged_to_batched(q, limits, s)
        out, lse = flash_mla_with_kvcache(batched, cache, table, lengths, dv, causal=True)
        return serving.batched_outputs_to_ragged(out, lse, limits, total)

    out, lse = attend(q, cache, table, lengths, limits)
    assert out.shape == (total, h, dv) and lse.shape == (total, h)
    for r in range(5):
        rows = slice(limits[r], limits[r + 1])
        want, want_lse = flash_mla_with_kvcache(
            q[None, rows], cache, table[r : r + 1], lengths[r : r + 1], dv, causal=True
        )
        np.testing.assert_allclose(out[rows], want[0], atol=1e-5)
        np.testing.assert_allclose(lse[rows], want_lse[0].T, atol=1e-5)
    assert not np.asarray(out[limits[-1] :]).any() and np.isposinf(lse[limits[-1] :]).all()


def test_chunks_of_different_lengths_merge_with_cached_context():
    """varlen over the new tokens and batched decode over the old ones, merged."""
    rng = np.random.default_rng(2)
    h, d, page = 2, 16, 4
    cached, new = i32([9, 0, 6]), i32([3, 4, 1])
    total = 10
    limits = serving.cu_seqlens(new)
    kv = jnp.asarray(rng.standard_normal((3, 16, 1, d)), F32)
    q = jnp.asarray(rng.standard_normal((total, h, d)), F32)
    cache, table = PagedKVCache.from_sequences(kv, page)
    rows = np.concatenate([kv[r, c : c + n] for r, (c, n) in enumerate(zip(cached, new))])  # noqa: B905
    rows = np.pad(rows, ((0, total - len(rows)), (0, 0), (0, 0)))
    on_new = flash_attn_varlen_func(q, rows, rows, limits, limits, 4, 4, causal=True)
    on_cached = flash_mla_with_kvcache(
        serving.ragged_to_batched(q, limits, 4), cache, table, cached, d
    )
    on_cached = serving.batched_outputs_to_ragged(*on_cached, limits, total)
    out, lse = merge_attention_states(*zip(on_new, on_cached, strict=True))
    want = flash_mla_with_kvcache(
        serving.ragged_to_batched(q, limits, 4), cache, table, cached + new, d, causal=True
    )
    want = serving.batched_outputs_to_ragged(*want, limits, total)
    np.testing.assert_allclose(out, want[0], atol=1e-5)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)


X, LIMITS, TABLE = np.zeros((4, 2), np.float32), i32([0, 1, 4]), np.zeros((2, 3), np.int32)
CACHE = PagedKVCache(np.zeros((6, 4, 1, 8), np.float32), "plain", 4)
SIZES = {"num_pages": 6, "page_size": 4, "num_heads_q": 2}


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda: serving.copy_pages(X, LIMITS, LIMITS), "'cache' is a ndarray; expected a Paged"),
        (lambda: serving.copy_pages(CACHE, LIMITS, LIMITS[:2]), r"'targets' has shape \(2,\)"),
        (lambda: serving.copy_pages(CACHE, X, LIMITS), "'sources' has shape"),
        (lambda: serving.copy_pages(CACHE, LIMITS, LIMITS, num_pages=4), "expected a divisor of"),
        (lambda: serving.ragged_to_batched(1.0, LIMITS, 2), "'x' is a float"),
        (lambda: serving.ragged_to_batched(np.float32(1), LIMITS, 2), r"'x' has shape \(\)"),
        (lambda: serving.ragged_to_batched(X, LIMITS[:0], 2), r"'cu_seqlens' has shape \(0,\)"),
        (lambda: serving.ragged_to_batched(X, LIMITS.astype(np.float32), 2), "has dtype float32"),
        (lambda: serving.ragged_to_batched(X, LIMITS, -1), "'max_tokens' is -1"),
        (lambda: serving.batched_to_ragged(X, LIMITS, 4), r"\(3,\); expected \(5,\) \(b \+ 1\)"),
        (lambda: serving.batched_to_ragged(X[0], LIMITS, 4), r"'x' has shape \(2,\)"),
        (lambda: serving.batched_outputs_to_ragged(X, X, LIMITS, 4), "'out' has shape"),
        (
            lambda: serving.batched_outputs_to_ragged(
                np.zeros((2, 3, 4, 5)), np.zeros((2, 3, 4)), LIMITS, 4
            ),
            r"'lse' has shape \(2, 3, 4\); expected \(2, 4, 3\)",
        ),
        (lambda: serving.new_token_positions(LIMITS, TABLE, 2), "'new_tokens' has shape"),
        (lambda: serving.plan_step(TABLE, LIMITS, LIMITS, 1, **SIZES), "'cache_seqlens' has shape"),
        (
            lambda: serving.plan_step(TABLE, LIMITS[:2], LIMITS[:2], 1, **SIZES, num_heads_k=3),
            "'num_heads_q' is 2; expected a multiple of num_heads_k=3",
        ),
    ],
)
def test_bad_calls_of_the_device(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# --- all of it ---

LAYERS, HEADS, DIM, DIM_V, POOL, SIZE, ROWS, WIDTH, DRAFT = 2, 3, 16, 12, 12, 4, 4, 6, 3


@jax.jit
def plan_of(table, lengths, new):
    return serving.plan_step(
        table, lengths, new, DRAFT, num_pages=POOL, page_size=SIZE, num_heads_q=HEADS
    )


def serve_step(cache, copies, table, lengths, new, q, kv):
    """q [t, layers, h, d] and kv [t, layers, d], packed; one plan for all layers."""
    cache = serving.copy_pages(cache, *copies, num_pages=POOL)
    plan = serving.plan_step(
        table, lengths, new, DRAFT, num_pages=POOL, page_size=SIZE, num_heads_q=HEADS
    )
    total = q.shape[0]
    limits = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new).astype(jnp.int32)])

    def layer(cache, inputs):
        index, q, kv = inputs
        table, slots = plan.layer(index)
        cache = cache.append(serving.ragged_to_batched(kv, limits, DRAFT), slots)
        out, lse = flash_mla_with_kvcache(
            serving.ragged_to_batched(q, limits, DRAFT),
            cache,
            table,
            plan.cache_seqlens,
            DIM_V,
            *plan.schedule,
            causal=True,
        )
        return cache, serving.batched_outputs_to_ragged(out, lse, limits, total)

    layers = jnp.arange(LAYERS, dtype=jnp.int32), q.swapaxes(0, 1), kv.swapaxes(0, 1)
    return jax.lax.scan(layer, cache, layers)


def attention_float64(q, keys):
    """One query token [layers, h, d] over a private, contiguous cache [n, layers, d]."""
    scores = np.einsum("lhd,nld->lhn", q, keys) * DIM**-0.5
    top = scores.max(axis=-1, keepdims=True)
    powers = np.exp(scores - top)
    total = powers.sum(axis=-1, keepdims=True)
    out = np.einsum("lhn,nlv->lhv", powers / total, keys[..., :DIM_V])
    return out, (top + np.log(total))[..., 0]


def test_continuous_batching():
    """Requests that come, share prefixes, grow, are rejected in part, give way and go."""
    rng = np.random.default_rng(3)
    pages = PageAllocator(POOL, SIZE)
    step = jax.jit(serve_step, donate_argnums=0)
    cache = PagedKVCache.zeros(LAYERS * POOL, SIZE, head_dim=DIM, dtype=F32)
    cache = PagedKVCache(jnp.full_like(cache.data, np.nan), "plain", SIZE)  # nobody may read these
    private: dict[int, np.ndarray] = {}  # [n, layers, d] of each request
    events = {"fork": 0, "copy": 0, "truncate": 0, "preempt": 0, "finish": 0}
    copies, next_name, checked = [], 0, 0
    batch: list[int | None] = [None] * ROWS
    for _ in range(60):
        for row, request in enumerate(batch):  # requests end, others take their rows
            if request is not None and len(private[request]) > 14:
                pages.free(request)
                del private[request]
                batch[row] = None
                events["finish"] += 1
        for row, request in enumerate(batch):
            if request is not None:
                continue
            sources = [r for r in batch if r is not None and len(private[r])]
            name, next_name = next_name, next_name + 1
            try:
                if sources and rng.random() < 0.6:
                    source = sources[rng.integers(len(sources))]
                    shared = int(rng.integers(1, len(private[source]) + 1))
                    copies += pages.fork(name, source, shared)
                    private[name] = private[source][:shared]
                    events["fork"] += 1
                else:
                    pages.allocate(name, 0)
                    private[name] = np.zeros((0, LAYERS, DIM))
            except OutOfPagesError:
                continue
            batch[row] = name
        new = np.zeros(ROWS, np.int32)
        for row in range(ROWS):
            count = int(rng.integers(1, DRAFT + 1))
            while batch[row] is not None:
                try:
                    pages.grow(batch[row], count)
                    new[row] = count
                    break
                except OutOfPagesError:  # the last row gives its pages back
                    victim = max(i for i in range(ROWS) if batch[i] is not None)
                    pages.free(batch[victim])
                    del private[batch[victim]]
                    batch[victim], new[victim] = None, 0
                    events["preempt"] += 1
        total = ROWS * DRAFT
        q = rng.standard_normal((total, LAYERS, HEADS, DIM)).astype(np.float32)
        kv = rng.standard_normal((total, LAYERS, DIM)).astype(np.float32)
        q[new.sum() :] = kv[new.sum() :] = np.nan
        events["copy"] += len(copies)
        arrays = page_copies(copies, size=ROWS * 2)
        copies = []
        lengths, table = pages.cache_seqlens(batch), pages.block_table(batch, WIDTH)
        plan = plan_of(table, lengths, new)
        packed = pages.slot_mapping(batch, new, size=total)
        np.testing.assert_array_equal(
            plan.slots,
            serving.ragged_to_batched(packed, serving.cu_seqlens(new), DRAFT, fill=-1),
        )
        cache, (out, lse) = step(cache, arrays, table, lengths, new, q, kv)
        out, lse = np.asarray(out).swapaxes(0, 1), np.asarray(lse).swapaxes(0, 1)
        token = 0
        for row, request in enumerate(batch):
            for _ in range(new[row]):
                private[request] = np.concatenate([private[request], kv[token : token + 1]])
                want, want_lse = attention_float64(q[token], private[request])
                np.testing.assert_allclose(out[token], want, atol=2e-5)
                np.testing.assert_allclose(lse[token], want_lse, atol=2e-5)
                token, checked = token + 1, checked + 1
        assert not out[token:].any() and np.isposinf(lse[token:]).all()
        for row, request in enumerate(batch):  # some drafted tokens are rejected
            if new[row] > 1 and rng.random() < 0.5:
                kept = len(private[request]) - int(rng.integers(1, new[row]))
                copies += pages.truncate(request, kept)
                private[request] = private[request][:kept]
                events["truncate"] += 1
    assert checked > 200 and min(events.values()) >= 3, events
    assert step._cache_size() == 1  # one shape for all of it
    for request in [r for r in batch if r is not None]:
        pages.free(request)
    assert pages.free_pages == POOL


def test_a_step_keeps_the_cache_in_place():
    cache = PagedKVCache.zeros(LAYERS * POOL, SIZE, head_dim=DIM, dtype=F32)
    total = ROWS * DRAFT
    arguments = (
        page_copies([], 2),
        np.full((ROWS, WIDTH), -1, np.int32),
        np.zeros(ROWS, np.int32),
        np.zeros(ROWS, np.int32),
        np.zeros((total, LAYERS, HEADS, DIM), np.float32),
        np.zeros((total, LAYERS, DIM), np.float32),
    )
    compiled = jax.jit(serve_step, donate_argnums=0).lower(cache, *arguments).compile()
    assert copies_of_the_cache(compiled, cache) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.data.nbytes


def test_plan_holds_what_single_calls_give():
    pages = PageAllocator(POOL, SIZE)
    pages.allocate("a", 9)
    pages.allocate("b", 2)
    batch, new = ["a", None, "b"], i32([1, 0, 1])
    table, lengths = pages.block_table(batch, WIDTH), pages.cache_seqlens(batch)
    plan = serving.plan_step(
        table, lengths, new, 1, num_pages=POOL, page_size=SIZE, num_heads_q=8, num_sm_parts=5
    )
    for got, want in zip(
        plan.schedule, get_mla_metadata(lengths, 8, 1, num_sm_parts=5), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert plan.positions.tolist() == [[8], [-1], [1]]
    np.testing.assert_array_equal(plan.slots[:, 0], [pages.slots("a", 8)[0], -1, 13])
    moved, slots = jax.jit(lambda plan, index: plan.layer(index))(plan, 1)
    np.testing.assert_array_equal(moved, np.where(table >= 0, table + POOL, -1))
    np.testing.assert_array_equal(slots[:, 0], [POOL * SIZE + plan.slots[0, 0], -1, 61])
