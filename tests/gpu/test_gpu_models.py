"""Layers of multi-head latent attention and a whole model on a GPU, in bfloat16 with the kernels.

The layers are judged by the formulas in float64 (mla_oracle.py), from the same rounded parameters
and inputs. What is rounded on the way to a result, each to 8 bits: activations after every
projection and norm, cached tokens, probabilities, the output. Each adds about 2^-9 in relative
norm, and 128 heads or several layers do not add up to more than ``TOLERANCE``.

Compiling takes most of the time. So XLA chooses kernels without timing them, nothing runs op by op,
and programs that are the same are compiled once.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import mla_oracle as oracle
import numpy as np
import pytest
import test_mla_core as core_tests
from test_gpu_decode import DECODE, METADATA, custom_calls

from jax_flashmla import PagedKVCache, _decode_loop, slot_mapping, token_slots
from jax_flashmla.flax import MLAConfig, chunked_prefill, core, decode, make_schedule, prefill

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.02
PAGES, PAGE = 16, 64
jit = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})

CONFIGS = {
    "v2-lite": MLAConfig.preset("deepseek-v2-lite", hidden_size=256),  # 16 heads
    "v3": MLAConfig.preset("deepseek-v3", hidden_size=512, q_lora_rank=192),  # 128 heads
}
# Pages of three requests; what follows a request's last one is none.
TABLE = np.full((3, 5), cases.GARBAGE, np.int32)
TABLE[:, :3] = [[11, 2, 14], [6, 0, 9], [3, 15, 8]]
KNOWN = (127, 0, 62)  # tokens in the cache at first; the next ones cross borders of pages


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@functools.cache
def sequences_of(config):
    """Three sequences [n, hidden], more than is in the cache at first."""
    made = core_tests.make_sequences([known + 40 for known in KNOWN], config)
    return [x.astype(cases.BFLOAT16) for x in made]


@functools.cache
def expected_of(config):
    """What the formulas give for them."""
    params = core_tests.make_params(config)
    return [oracle.attention(params, x, config) for x in sequences_of(config)]


def empty(config, layers=1):
    """A cache of NaN, which nothing may read before it is written."""
    shape = (layers * PAGES, PAGE, 1, config.cache_dim)
    return PagedKVCache(jnp.full(shape, jnp.nan, config.dtype), "plain", PAGE)


@functools.cache
def filling(config):
    """The program of `filled`."""

    @jit
    def fill(params, x, cache):
        result = prefill(params, x, core_tests.cu_seqlens_of(KNOWN), config=config)
        slots = slot_mapping(
            TABLE, result.positions, PAGE, request_ids=result.request_ids, num_pages=PAGES
        )
        return cache.append(result.kv_c, slots, k_pe=result.k_pe)

    return fill


def filled(config, cache=None):
    """A cache with the first tokens of the sequences, as prefill leaves them."""
    x = np.concatenate([s[:n] for s, n in zip(sequences_of(config), KNOWN, strict=True)])
    return filling(config)(
        core_tests.make_params(config), x, empty(config) if cache is None else cache
    )


def on_gpu(array):
    """The array on the host, after a look at where it was computed."""
    assert {device.platform for device in array.devices()} == {"gpu"}
    return np.asarray(array)


def bits(array):
    return np.asarray(array).view(np.uint16)


programs = {}


def compile_in_place(function, *arguments, cache, attentions=1, schedules=1, **options):
    """A compiled step with a donated cache; so many calls of the kernels, no copy of the cache."""
    jitted = jit(functools.partial(function, **options), donate_argnames="cache")
    lowered = jitted.lower(*arguments, cache=cache)
    name = lowered.as_text(), lowered.in_tree
    compiled = programs[name] = programs.get(name) or lowered.compile()
    assert custom_calls(compiled, DECODE) == attentions
    assert custom_calls(compiled, METADATA) == schedules
    memory = _decode_loop.inspect(compiled, cache)
    assert memory["in_place"], memory
    return compiled


# ------------------------------------------------------------------ one layer


def next_tokens(config, done, counts, s):
    """x [3, s, hidden] and positions of the next tokens of each request, padding first."""
    x = np.full((3, s, config.hidden_size), np.nan, cases.BFLOAT16)
    positions = np.full((3, s), -1, np.int32)
    for r, (sequence, first, n) in enumerate(zip(sequences_of(config), done, counts, strict=True)):
        x[r, s - n :] = sequence[first : first + n]
        positions[r, s - n :] = np.arange(first, first + n)
    return x, positions


def one_token(config, cache, params, x, positions):
    """A step of decode."""
    function = functools.partial(decode, config=config, implementation="cuda")
    run = compile_in_place(function, params, x, positions, cache=cache, block_table=TABLE)
    return run(params, x, positions, cache=cache)


@pytest.mark.parametrize("s", [1, 4])
def test_decode(config, s):
    """Requests of different lengths, with fewer tokens in some steps, or without any."""
    params = core_tests.make_params(config)
    steps = {1: [(1, 1, 1)] * 3 + [(1, 0, 1)], 4: [(4, 4, 4), (4, 1, 3), (2, 4, 0)]}[s]
    results = {}
    for implementation in (None, "cuda"):
        cache, done = filled(config), list(KNOWN)
        x, positions = next_tokens(config, done, steps[0], s)
        run = compile_in_place(
            functools.partial(decode, config=config, implementation=implementation),
            params,
            x,
            positions,
            cache=cache,
            block_table=TABLE,
        )
        outs = [[], [], []]
        for counts in steps:
            x, positions = next_tokens(config, done, counts, s)
            out, cache = run(params, x, positions, cache=cache)
            out = on_gpu(out)
            assert out.dtype == cases.BFLOAT16
            for r, n in enumerate(counts):
                outs[r].extend(out[r, s - n :])
                assert np.all(out[r, : s - n] == 0)
                done[r] += n
        results[implementation] = outs
    for r, known in enumerate(KNOWN):
        expected = expected_of(config)[r][known : done[r]]
        assert oracle.error(results[None][r], expected) < TOLERANCE
        np.testing.assert_array_equal(bits(results[None][r]), bits(results["cuda"][r]))


def test_prefill_in_chunks(config):
    """On top of what is cached: the context goes through the kernel, new tokens do not yet."""
    params = core_tests.make_params(config)
    counts = (30, 9, 1)
    parts = [
        s[known : known + n]
        for s, known, n in zip(sequences_of(config), KNOWN, counts, strict=True)
    ]
    padding = np.full((3, config.hidden_size), np.nan, cases.BFLOAT16)
    x, limits = np.concatenate([*parts, padding]), core_tests.cu_seqlens_of(counts)
    context = np.array(KNOWN, np.int32)
    cache = filled(config)
    run = compile_in_place(
        functools.partial(chunked_prefill, config=config, max_seqlen=32),
        params,
        x,
        limits,
        context,
        cache=cache,
        block_table=TABLE,
    )
    out, cache = run(params, x, limits, context, cache=cache)
    out = on_gpu(out)
    for r, (known, n) in enumerate(zip(KNOWN, counts, strict=True)):
        expected = expected_of(config)[r][known : known + n]
        assert oracle.error(out[limits[r] : limits[r + 1]], expected) < TOLERANCE
    assert np.all(out[limits[-1] :] == 0)

    # What it has written is a context like any other.
    done = [known + n for known, n in zip(KNOWN, counts, strict=True)]
    x, positions = next_tokens(config, done, (1, 1, 1), 1)
    out, _ = one_token(config, cache, params, x, positions)
    for r in range(3):
        assert oracle.error(out[r], expected_of(config)[r][done[r]][None]) < TOLERANCE


def test_sparse_decode_and_fp8_cache():
    """Right whether there are kernels for them or not."""
    config = CONFIGS["v2-lite"]
    params = core_tests.make_params(config)
    x, positions = next_tokens(config, KNOWN, (1, 1, 1), 1)
    every = np.where(np.arange(192) <= positions, np.arange(192), -1)[:, None].astype(np.int32)
    indices = token_slots(every, TABLE, PAGE, num_pages=PAGES)

    @jit
    def attend_to(params, cache, indices):
        schedule = make_schedule(config, positions, topk=192)
        options = {"config": config, "indices": indices, "schedule": schedule}
        return decode(params, x, positions, cache, TABLE, **options)[0]

    @jit
    def attend_to_all(params, cache):
        return decode(params, x, positions, cache, TABLE, config=config)[0]

    sparse = attend_to(params, filled(config), indices)
    quantised = filled(config, PagedKVCache.zeros(PAGES, PAGE, format="fp8_v32"))
    fp8 = attend_to_all(params, quantised)
    for r, known in enumerate(KNOWN):
        expected = expected_of(config)[r][known][None]
        assert oracle.error(on_gpu(sparse)[r], expected) < TOLERANCE
        assert oracle.error(on_gpu(fp8)[r], expected) < 0.08  # e4m3: up to 1 / 16 of each number


# ------------------------------------------------------------------ several layers


def smaller(value):
    """Matrices of variance 1 / inputs. Those of one layer are larger, so that its scores matter;
    in the next one its rounding errors would grow and hide others."""
    return value if value.ndim == 1 else (value.astype(np.float32) / 1.7).astype(value.dtype)


def stack(config, layers):
    """Parameters of several layers, in front."""
    made = [core_tests.make_params(config, seed) for seed in range(layers)]
    return {name: np.stack([smaller(params[name]) for params in made]) for name in made[0]}


def through_layers(x, params, attend, cache):
    """Layers with a norm before and a residual around, over one cache. ``x`` and the cache."""

    def layer(carry, inputs):
        x, cache = carry
        params, index = inputs
        hidden = core.rms_norm(x, jnp.ones(x.shape[-1]), 1e-6)
        out, cache = attend(params, hidden, cache, index * PAGES)
        return (x + out, cache), None

    numbers = jnp.arange(len(params["o_proj"]), dtype=jnp.int32)
    return jax.lax.scan(layer, (x, cache), (params, numbers))[0]


def decode_layers(params, x, positions, cache, *, config, implementation):
    schedule = (None, None)
    if implementation != "xla":
        schedule = make_schedule(config, positions)

    def attend(params, hidden, cache, first_page):
        return decode(
            *(params, hidden, positions, cache, TABLE[: len(x)]),
            config=config,
            schedule=schedule,
            first_page=first_page,
            num_pages=PAGES,
            implementation=implementation,
        )

    return through_layers(x, params, attend, cache)


def exact_layers(params, sequences, config):
    """Several layers by the formulas, of each sequence [n, hidden]."""
    results = [np.asarray(x, np.float64) for x in sequences]
    for layer in range(len(params["o_proj"])):
        own = {name: np.asarray(value[layer], np.float64) for name, value in params.items()}
        for i, x in enumerate(results):
            hidden = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
            results[i] = x + oracle.attention(own, hidden, config)
    return results


def test_layers_with_kernels_and_with_xla(config):
    layers, s = 3, 4
    host = stack(config, layers)
    params = jax.device_put(host)
    cache, done = empty(config, layers), [0, 0, 0]
    x, positions = next_tokens(config, done, (s, s, s), s)
    programs = {
        implementation: compile_in_place(
            functools.partial(decode_layers, config=config, implementation=implementation),
            params,
            x,
            positions,
            cache=cache,
            attentions=calls,
            schedules=calls,
        )
        for implementation, calls in (("cuda", 1), ("xla", 0))
    }
    # The context, with the kernels.
    while done != list(KNOWN):
        counts = [min(s, known - n) for known, n in zip(KNOWN, done, strict=True)]
        x, positions = next_tokens(config, done, counts, s)
        _, cache = programs["cuda"](params, x, positions, cache=cache)
        done = [n + count for n, count in zip(done, counts, strict=True)]
    x, positions = next_tokens(config, done, (s, s, s), s)
    data, results = np.asarray(cache.data), {}
    for implementation, run in programs.items():
        own = PagedKVCache(jnp.asarray(data), "plain", PAGE)
        results[implementation] = on_gpu(run(params, x, positions, cache=own)[0])
    assert oracle.error(results["cuda"], results["xla"]) < 0.01
    sequences = [x[: n + s] for x, n in zip(sequences_of(config), KNOWN, strict=True)]
    expected = exact_layers(host, sequences, config)
    for r, known in enumerate(KNOWN):
        for result in results.values():
            assert oracle.error(result[r], expected[r][known:]) < TOLERANCE


def test_64_chained_steps():
    """Each token follows from the one before. The same bits again, and what the formulas say."""
    config, layers, steps = CONFIGS["v2-lite"], 2, 64
    host = stack(config, layers)
    params = jax.device_put(host)
    rng = np.random.default_rng(7)
    tables = rng.standard_normal((2, 500, config.hidden_size)).astype(cases.BFLOAT16)
    embedding, unembedding = jax.device_put(tuple(tables))
    prompts = [rng.integers(0, 500, n) for n in (70, 1, 40)]
    longest = max(map(len, prompts))

    def step(params, tokens, positions, *, cache, implementation):
        x, cache = decode_layers(
            *(params, embedding[tokens], positions, cache),
            config=config,
            implementation=implementation,
        )
        scores = core.rms_norm(x, jnp.ones(config.hidden_size), 1e-6) @ unembedding.T
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), x, positions + 1, cache

    tokens = np.zeros((3, longest), np.int32)  # prompts, padding first
    positions = np.full((3, longest), -1, np.int32)
    for r, prompt in enumerate(prompts):
        tokens[r, longest - len(prompt) :] = prompt
        positions[r, longest - len(prompt) :] = np.arange(len(prompt))
    inputs = [(tokens[:, t : t + 1].copy(), positions[:, t : t + 1].copy()) for t in range(longest)]
    runs = []
    for implementation in ("cuda", "cuda", None):
        cache = empty(config, layers)
        run = compile_in_place(step, params, *inputs[0], cache=cache, implementation=implementation)
        address = cache.data.unsafe_buffer_pointer()
        seen, outs = [], []
        for t in range(longest + steps):
            if t < longest:
                following, next_positions = inputs[t]
            seen.append(following)
            following, x, next_positions, cache = run(
                params, following, next_positions, cache=cache
            )
            outs.append(x)
        assert cache.data.unsafe_buffer_pointer() == address
        seen, outs = (jax.device_get(values[longest:]) for values in (seen, outs))
        runs.append((np.stack(seen)[..., 0], np.stack(outs)[:, :, 0], np.asarray(cache.data)))
    tokens, outs, data = runs[0]
    assert len(np.unique(tokens)) > 20  # not one token for ever
    for again in runs[1:]:
        np.testing.assert_array_equal(tokens, again[0])
        np.testing.assert_array_equal(bits(outs), bits(again[1]))
        np.testing.assert_array_equal(bits(data), bits(again[2]))
    texts = [np.concatenate([prompt, tokens[:, r]]) for r, prompt in enumerate(prompts)]
    expected = exact_layers(host, [tables[0][text] for text in texts], config)
    for r, prompt in enumerate(prompts):
        exact = expected[r][len(prompt) :]
        assert oracle.error(outs[:, r], exact) < TOLERANCE
        for t in (0, steps // 2, steps - 1):  # no step is hidden by the others
            assert oracle.error(outs[t, r], exact[t]) < 2 * TOLERANCE


# ------------------------------------------------------------------ Flax

if importlib.util.find_spec("flax") is not None:  # a skipped test would fail runs without it

    @pytest.mark.parametrize("kind", ["nnx", "linen"])
    def test_flax_layer(kind):
        config = CONFIGS["v2-lite"]
        params = core_tests.make_params(config)
        x, positions = next_tokens(config, KNOWN, (1, 1, 1), 1)
        if kind == "nnx":
            from flax import nnx

            from jax_flashmla.flax.nnx import MultiHeadLatentAttention

            layer = nnx.eval_shape(lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0)))
            graph, state = nnx.split(layer)

            def call(params, cache):
                values = nnx.State({name: nnx.Param(value) for name, value in params.items()})
                own = nnx.merge(graph, values)
                return own.decode(x, positions, cache, TABLE, implementation="cuda")

        else:
            from jax_flashmla.flax.linen import MultiHeadLatentAttention

            def call(params, cache):
                return MultiHeadLatentAttention(config).apply(
                    {"params": params},
                    *(x, positions, cache, TABLE),
                    implementation="cuda",
                    method="decode",
                )

        cache = filled(config)
        run = compile_in_place(call, params, cache=cache)
        out, _ = run(params, cache=cache)
        expected, _ = one_token(config, filled(config), params, x, positions)
        assert oracle.error(on_gpu(out), expected) < 1e-3


# ------------------------------------------------------------------ a whole model

HF_CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "num_attention_heads": 16,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 500,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
}
MIXTURE = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}


@pytest.fixture(scope="module")
def model():
    """examples/deepseek/model.py; the files beside it need packages that read checkpoints."""
    path = ROOT / "examples" / "deepseek" / "model.py"
    spec = importlib.util.spec_from_file_location("deepseek_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def model_params(config):
    """Random parameters, in the arrangement that model.py describes."""
    rng = np.random.default_rng(11)
    hidden = config.attention.hidden_size

    def matrix(*shape, inputs=None, dtype=cases.BFLOAT16):
        values = rng.standard_normal(shape) * (shape[-1] if inputs is None else inputs) ** -0.5
        return values.astype(dtype)

    def mlp(*lead, columns):
        return {
            "gate": matrix(*lead, columns, hidden),
            "up": matrix(*lead, columns, hidden),
            "down": matrix(*lead, hidden, columns),
        }

    def run(is_mixture, layers):
        n, mixture = len(layers), config.mixture
        made = [core_tests.make_params(config.attention, layer) for layer in layers]
        result = {
            "attention": {name: np.stack([smaller(p[name]) for p in made]) for name in made[0]},
            "attention_norm": np.ones((n, hidden), cases.BFLOAT16),
            "mlp_norm": np.ones((n, hidden), cases.BFLOAT16),
        }
        if not is_mixture:
            return result | {"mlp": mlp(n, columns=config.intermediate_size)}
        experts = mixture.num_experts
        return result | {
            "mlp": mlp(n, columns=mixture.num_shared * mixture.columns),
            "router": matrix(n, experts, hidden, dtype=np.float32),
            "router_bias": matrix(n, experts, inputs=100, dtype=np.float32),
            "experts": mlp(n, experts, columns=mixture.columns),
        }

    params = {
        "embed": matrix(config.vocab_size, hidden, inputs=1),
        "runs": [run(*kind_and_layers) for kind_and_layers in config.runs],
        "norm": np.ones((hidden,), cases.BFLOAT16),
        "unembed": matrix(config.vocab_size, hidden),
    }
    return jax.device_put(params)


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_model_generates(model, kind):
    """Greedy tokens of prompts of different lengths, against XLA's attention on the same tokens."""
    config = model.Config.from_hf(HF_CONFIG | (MIXTURE if kind == "mixture" else {}))
    params, steps = model_params(config), 32
    prompts = [np.random.default_rng(r).integers(0, 500, n) for r, n in enumerate((63, 1, 100))]
    limits = core_tests.cu_seqlens_of([len(p) for p in prompts])
    layers, runs = config.num_layers, len(config.runs)
    assert runs == (2 if kind == "mixture" else 1)

    @jit
    def begin(params):
        hidden, cache = model.prefill(
            *(params, np.concatenate(prompts), limits, empty(config.attention, layers), TABLE),
            config=config,
        )
        first = jnp.argmax(model.logits(params, hidden[limits[1:] - 1]), axis=-1)
        return first.astype(jnp.int32), cache

    def step(params, tokens, positions, *, cache, implementation):
        hidden, cache = model.decode(
            *(params, tokens[:, None], positions[:, None], cache, TABLE),
            config=config,
            implementation=implementation,
        )
        logits = model.logits(params, hidden[:, 0])
        return logits, jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    first, start = begin(params)
    positions = np.diff(limits).astype(np.int32)

    def generate(implementation, calls, forced=None):
        cache = jax.tree.map(jnp.copy, start)
        run = compile_in_place(
            *(step, params, first, positions),
            cache=cache,
            attentions=calls,
            schedules=1,  # of make_schedule, whatever attends
            implementation=implementation,
        )
        tokens, seen, scores = first, [], []
        for t in range(steps):
            tokens = tokens if forced is None else forced[t]
            seen.append(np.asarray(tokens))
            logits, tokens, cache = run(params, tokens, positions + np.int32(t), cache=cache)
            scores.append(logits)
        return np.stack(seen), np.stack([on_gpu(logits) for logits in scores])

    tokens, ours = generate(None, calls=runs)
    again, insisted = generate("cuda", calls=runs)
    np.testing.assert_array_equal(tokens, again)
    np.testing.assert_array_equal(ours, insisted)
    assert len(np.unique(tokens)) > 20
    _, xla = generate("xla", calls=0, forced=tokens)

    errors = np.linalg.norm(ours - xla, axis=-1) / np.linalg.norm(xla, axis=-1)
    chosen = np.take_along_axis(xla[:-1], tokens[1:, :, None], axis=-1)[..., 0]
    # The best token, or one that bfloat16 cannot tell from it.
    good = xla[:-1].max(axis=-1) - chosen <= 0.15 * xla.std()
    if kind == "dense":
        assert errors.max() < 0.03 and good.all(), errors
    else:
        # Where two experts are as good, rounding decides, and the token's result is another.
        assert np.median(errors) < 0.03 and np.mean(good) > 0.9, errors
