"""examples/deepseek: what it loads, and that what it generates is what the model says.

Checkpoints here are tiny and random, written as Hugging Face's are. The model in numpy below
follows the papers (arXiv 2405.04434, 2412.19437): whole sequences, nothing cached or sorted.
tests/parity compares the example with transformers itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mla_oracle as oracle
import numpy as np
import pytest

import jax_flashmla
from jax_flashmla.flax import empty_cache, param_shapes

safetensors_numpy = pytest.importorskip("safetensors.numpy")

EXAMPLE = Path(__file__).parents[1] / "examples" / "deepseek"
sys.path.append(str(EXAMPLE))
import checkpoint  # noqa: E402
import generate  # noqa: E402
import model  # noqa: E402
import parallel  # noqa: E402

COMMON = {
    "hidden_act": "silu",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "torch_dtype": "float32",
    "eos_token_id": 47,
}
V2 = COMMON | {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": None,
}
V3 = COMMON | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "n_shared_experts": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


def make_tensors(config, seed=0):
    """Random tensors under the names of Hugging Face, float32."""
    rng = np.random.default_rng(seed)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent, rank, value = config["kv_lora_rank"], config["q_lora_rank"], config["v_head_dim"]
    tensors = {}

    def matrix(name, outputs, inputs, scale=1.0):
        values = rng.standard_normal((outputs, inputs)) * scale * inputs**-0.5
        tensors[f"{name}.weight"] = values.astype(np.float32)

    def norm(name, columns):
        values = 1 + 0.3 * rng.standard_normal(columns)
        tensors[f"{name}.weight"] = values.astype(np.float32)

    def mlp(name, columns):
        matrix(f"{name}.gate_proj", columns, hidden)
        matrix(f"{name}.up_proj", columns, hidden)
        matrix(f"{name}.down_proj", hidden, columns)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    norm("model.norm", hidden)
    if not config.get("tie_word_embeddings"):
        matrix("lm_head", config["vocab_size"], hidden, 2.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm", hidden)
        norm(f"{prefix}.post_attention_layernorm", hidden)
        own = f"{prefix}.self_attn"
        if rank is None:
            matrix(f"{own}.q_proj", heads * (nope + rope), hidden)
        else:
            matrix(f"{own}.q_a_proj", rank, hidden)
            norm(f"{own}.q_a_layernorm", rank)
            matrix(f"{own}.q_b_proj", heads * (nope + rope), rank)
        matrix(f"{own}.kv_a_proj_with_mqa", latent + rope, hidden)
        norm(f"{own}.kv_a_layernorm", latent)
        matrix(f"{own}.kv_b_proj", heads * (nope + value), latent)
        matrix(f"{own}.o_proj", hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        matrix(f"{prefix}.mlp.gate", config["n_routed_experts"], hidden)
        if config["topk_method"] == "noaux_tc":
            bias = 0.2 * rng.standard_normal(config["n_routed_experts"])
            name = f"{prefix}.mlp.gate.e_score_correction_bias"
            tensors[name] = bias.astype(np.float32)
        columns = config["moe_intermediate_size"]
        mlp(f"{prefix}.mlp.shared_experts", columns * config["n_shared_experts"])
        for expert in range(config["n_routed_experts"]):
            mlp(f"{prefix}.mlp.experts.{expert}", columns)
    return tensors


def write(folder, config, tensors, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors_numpy.save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors_numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ---------------------------------------------------------------------------------------------
# The model in numpy


def route_one(scores_in, config, bias):
    """Experts and weights of one token, from the router's logits. Plain loops."""
    n, k = config["n_routed_experts"], config["num_experts_per_tok"]
    sigmoid = config["topk_method"] == "noaux_tc"
    if sigmoid:
        scores = 1 / (1 + np.exp(-scores_in))
        merit = scores + bias
    else:
        scores = np.exp(scores_in - scores_in.max())
        merit = scores = scores / scores.sum()
    candidates = range(n)
    if config["topk_method"] != "greedy":
        size = n // config["n_group"]
        groups = [list(range(g * size, (g + 1) * size)) for g in range(config["n_group"])]
        count = 2 if sigmoid else 1
        worth = [sum(sorted(merit[group])[-count:]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -worth[g])[: config["topk_group"]]
        candidates = [expert for g in best for expert in groups[g]]
    chosen = sorted(candidates, key=lambda e: -merit[e])[:k]
    weights = scores[chosen]
    if config["norm_topk_prob"]:
        weights = weights / weights.sum()
    return dict(zip(chosen, weights * config["routed_scaling_factor"], strict=True))


def expected_logits(config, tensors, tokens):
    """Logits [n, vocabulary] of one sequence, in float64."""
    t = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    own = model.Config.from_hf(config).attention  # numbers, for the oracle
    heads, nope = own.num_heads, own.qk_nope_head_dim

    def norm(x, name):
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * t[f"{name}.weight"]

    def mlp(x, name):
        gate = x @ t[f"{name}.gate_proj.weight"].T
        up = x @ t[f"{name}.up_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ t[f"{name}.down_proj.weight"].T

    def attention(x, name):
        def w(key):
            return t[f"{name}.{key}.weight"].T

        params = {"kv_a_proj": w("kv_a_proj_with_mqa"), "kv_a_norm": w("kv_a_layernorm")}
        if own.q_lora_rank is None:
            params["q_proj"] = w("q_proj").reshape(x.shape[1], heads, -1)
        else:
            params["q_a_proj"], params["q_a_norm"] = w("q_a_proj"), w("q_a_layernorm")
            params["q_b_proj"] = w("q_b_proj").reshape(own.q_lora_rank, heads, -1)
        both = w("kv_b_proj").reshape(own.kv_lora_rank, heads, -1)
        params["k_b_proj"], params["v_b_proj"] = both[..., :nope], both[..., nope:]
        params["o_proj"] = w("o_proj").reshape(heads, own.v_head_dim, -1)
        return oracle.attention(params, x, own)

    x = t["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = x + attention(norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn")
        inside = norm(x, f"{prefix}.post_attention_layernorm")
        if layer < config["first_k_dense_replace"]:
            x = x + mlp(inside, f"{prefix}.mlp")
            continue
        out = mlp(inside, f"{prefix}.mlp.shared_experts")
        scores = inside @ t[f"{prefix}.mlp.gate.weight"].T
        bias = t.get(f"{prefix}.mlp.gate.e_score_correction_bias")
        for i in range(len(x)):
            for expert, weight in route_one(scores[i], config, bias).items():
                out[i] += weight * mlp(inside[i], f"{prefix}.mlp.experts.{expert}")
        x = x + out
    unembed = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ unembed.T


def assert_greedy(config, tensors, prompt, tokens):
    """The tokens are the best ones, or such as only rounding tells from them."""
    logits = expected_logits(config, tensors, np.array([*prompt, *tokens[:-1]]))
    logits = logits[len(prompt) - 1 :]
    chosen = np.take_along_axis(logits, np.array(tokens)[:, None], axis=-1)[:, 0]
    assert np.all(logits.max(axis=-1) - chosen <= 1e-4)


# ---------------------------------------------------------------------------------------------
# Models and engines that tests share, since compiling takes most of the time


@dataclasses.dataclass
class Loaded:
    hf: dict
    tensors: dict
    folder: Path
    params: dict
    config: model.Config
    engine: generate.Engine


PROMPT_LENGTHS, NEW = (23, 2, 9, 17), (12, 20, 5, 16)


def engine_of(params, config, **options):
    options = {"max_batch": 2, "max_length": 48, "page_size": 8, "num_pages": 9} | options
    return generate.Engine(params, config, **options)


def requests_of(seed=0):
    rng = np.random.default_rng(seed)
    return [
        generate.Request(rng.integers(0, 47, n).tolist(), new, seed=i)
        for i, (n, new) in enumerate(zip(PROMPT_LENGTHS, NEW, strict=True))
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    @functools.cache
    def get(name):
        hf = {"v2": V2, "v3": V3}[name]
        tensors = make_tensors(hf)
        folder = write(tmp_path_factory.mktemp("models") / name, hf, tensors)
        params, config = checkpoint.load(folder)
        return Loaded(hf, tensors, folder, params, config, engine_of(params, config))

    return get


@pytest.fixture(params=["v2", "v3"])
def loaded(request, models):
    return models(request.param)


# ---------------------------------------------------------------------------------------------
# Generating


def test_decoding_step_by_step_gives_the_logits_of_the_full_sequence(loaded):
    tokens = np.random.default_rng(3).integers(0, 48, 24).astype(np.int32)
    first = 14
    cache = empty_cache(loaded.config.attention, 3, 8, num_layers=loaded.config.num_layers)
    table = np.array([[2, 0, 1]], np.int32)

    @jax.jit
    def both(params, cache):
        limits = np.array([0, first], np.int32)
        padded = np.where(np.arange(len(tokens)) < first, tokens, 0)
        hidden, cache = model.prefill(params, padded, limits, cache, table, config=loaded.config)

        def step(cache, position):
            out, cache = model.decode(
                params,
                jnp.asarray(tokens)[position].reshape(1, 1),
                position.reshape(1, 1),
                cache,
                table,
                config=loaded.config,
            )
            return cache, out[0, 0]

        positions = jnp.arange(first, len(tokens), dtype=jnp.int32)
        _, rest = jax.lax.scan(step, cache, positions)
        return model.logits(params, jnp.concatenate([hidden[:first], rest]))

    expected = expected_logits(loaded.hf, loaded.tensors, tokens)
    assert oracle.error(both(loaded.params, cache), expected) < 1e-5


def test_continuous_batching_generates_what_the_model_says(loaded):
    requests = requests_of()
    joined = []
    admit = loaded.engine._admit

    def watched(waiting):
        rows = admit(waiting)
        joined.append(len(rows))
        return rows

    loaded.engine._admit = watched
    try:
        times = loaded.engine.generate(requests)
    finally:
        loaded.engine._admit = admit
    for request in requests:
        ended = request.tokens[-1] == 47
        assert len(request.tokens) == request.max_new_tokens or ended
        assert_greedy(loaded.hf, loaded.tensors, request.prompt, request.tokens)
    # The first two fill the batch; the others joined later, between steps.
    assert joined[0] == 2 and sum(joined) == 4
    assert loaded.engine.pages[0].free_pages == 9
    assert times.prefill_tokens == sum(PROMPT_LENGTHS)
    assert times.decode_tokens == sum(len(request.tokens) - 1 for request in requests)
    assert len(set(sum((request.tokens for request in requests), []))) > 8


def test_a_request_alone_gets_the_same_tokens_and_nothing_is_compiled_again(loaded):
    together = requests_of()
    loaded.engine.generate(together)
    programs = dict(loaded.engine.programs)
    for alone, request in zip(requests_of(), together, strict=True):
        loaded.engine.generate([alone])
        assert alone.tokens == request.tokens
    assert loaded.engine.programs == programs
    assert len(programs) == 2  # one of prefill, one of decode


def test_requests_wait_for_pages():
    # Of 9 pages of 8 tokens the requests need 5, 3, 2 and 4, so never more than two fit.
    engine = engine_of({}, model.Config.from_hf(V2), max_batch=4)
    waiting = [*requests_of()]
    queue = generate.collections.deque(waiting)
    assert [len(engine._admit(queue)), engine.pages[0].free_pages, len(queue)] == [2, 1, 2]
    assert engine._admit(queue) == []
    engine.pages[0].free(waiting[0])
    engine.rows[0] = None
    assert len(engine._admit(queue)) == 2 and engine.pages[0].free_pages == 0


def test_long_prompts_do_not_share_a_prefill():
    engine = engine_of({}, model.Config.from_hf(V2), max_batch=4, num_pages=24)
    engine.max_prefill_tokens = 20
    queue = generate.collections.deque(requests_of())  # prompts of 23, 2, 9 and 17 tokens
    assert [len(engine._admit(queue)) for _ in range(3)] == [1, 2, 1]


def test_end_of_text(loaded):
    [request] = requests_of()[:1]
    loaded.engine.generate([request])
    end = request.tokens[4]
    first = request.tokens.index(end)
    loaded.engine.config, config = dataclasses.replace(loaded.config, eos=(end,)), loaded.config
    try:
        [again] = requests_of()[:1]
        done = []
        loaded.engine.generate([again], done.append)
    finally:
        loaded.engine.config = config
    assert again.tokens == request.tokens[: first + 1]
    assert sum(done) == again.max_new_tokens  # the bar is full
    assert loaded.engine.pages[0].free_pages == 9


def test_sampling():
    n = 4000
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    wide = jnp.broadcast_to(logits, (n, 3))
    seeds, positions = jnp.full(n, 5, jnp.int32), jnp.arange(n, dtype=jnp.int32)
    sample = jax.jit(generate.sample)
    drawn = np.asarray(sample(wide, seeds, positions, jnp.ones(n)))
    assert np.allclose(np.bincount(drawn, minlength=3) / n, [0.1, 0.2, 0.7], atol=0.03)
    cold = np.asarray(sample(wide, seeds, positions, jnp.full(n, 0.5)))
    assert np.allclose(np.bincount(cold) / n, np.array([1, 4, 49]) / 54, atol=0.03)
    # Of a row only its own seed, position and temperature count; 0 is the best token.
    warm = jnp.arange(n) % 2 == 1
    mixed = np.asarray(sample(wide, seeds, positions, warm.astype(jnp.float32)))
    assert mixed.tolist() == np.where(warm, drawn, 2).tolist()
    assert int(sample(wide[:1], seeds[:1], positions[7:8], jnp.ones(1))[0]) == drawn[7]
    other = np.asarray(sample(wide, seeds + 1, positions, jnp.ones(n)))
    assert 0.3 < np.mean(other != drawn) < 0.7
    assert sample(wide, seeds, positions, jnp.zeros(n)).tolist() == [2] * n


def test_a_sampled_request_does_not_depend_on_the_batch(models):
    engine = models("v2").engine

    def warm():
        requests = requests_of()
        for request in requests[1:]:
            request.temperature = 0.8
        return requests

    together, alone, other, greedy = warm(), warm(), warm()[1], requests_of()[1]
    engine.generate(together)
    for request in alone:  # each in the first row
        engine.generate([request])
    assert [r.tokens for r in alone] == [r.tokens for r in together]
    other.seed = 99
    engine.generate([other])
    engine.generate([greedy])
    assert other.tokens != alone[1].tokens != greedy.tokens
    assert len(engine.programs) == 2


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 4, "request 0 has no prompt"),
        ([1], 0, "nothing to generate"),
        ([1, 48], 4, "outside of the vocabulary"),
        ([1] * 40, 30, "may take 69 tokens; the cache has room for 48"),
    ],
)
def test_requests_that_cannot_be_served(prompt, new, message):
    engine = engine_of({}, model.Config.from_hf(V2))
    with pytest.raises(ValueError, match=message):
        engine.generate([generate.Request(prompt, new)])


# ---------------------------------------------------------------------------------------------
# The mixture


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
@pytest.mark.parametrize("normalise", [False, True])
def test_router(method, normalise):
    base = V3 if method == "noaux_tc" else V2
    hf = base | {
        "topk_method": method,
        "norm_topk_prob": normalise,
        "n_routed_experts": 24,
        "n_group": 6,
        "topk_group": 3,
        "num_experts_per_tok": 5,
        "routed_scaling_factor": 1.0 if method != "noaux_tc" and normalise else 3.5,
    }
    rng = np.random.default_rng(11)
    x, router = rng.standard_normal((40, 32)), rng.standard_normal((24, 32)) / 6
    bias = rng.standard_normal(24) if method == "noaux_tc" else None
    mixture = model.Config.from_hf(hf).mixture
    chosen, weights = jax.jit(model.route, static_argnums=3)(
        jnp.float32(x), jnp.float32(router), None if bias is None else jnp.float32(bias), mixture
    )
    for i in range(len(x)):
        expected = route_one(router @ x[i], hf, bias)
        found = dict(zip(chosen[i].tolist(), weights[i].tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert all(found[e] == pytest.approx(expected[e], rel=1e-5) for e in expected)


@pytest.mark.parametrize(
    ("t", "k", "spread"), [(1, 3, "any"), (40, 3, "any"), (40, 2, "one"), (300, 2, "any")]
)
def test_experts(t, k, spread):
    """Blocks of all sizes, experts without tokens, and all tokens for one expert."""
    rng = np.random.default_rng(t)
    n, hidden, columns, first = 6, 8, 5, 6
    shapes = {"gate": (columns, hidden), "up": (columns, hidden), "down": (hidden, columns)}
    # Of three layers; that of the others must not count.
    experts = {key: np.full((3 * n, *shape), np.nan) for key, shape in shapes.items()}
    for values in experts.values():
        values[first : first + n] = rng.standard_normal(values[:n].shape)
    x, weights = rng.standard_normal((t, hidden)), rng.standard_normal((t, k))
    pool = [0, 2, 3, 5] if spread == "any" else [4, 1]
    chosen = np.array([rng.permutation(pool)[:k] for _ in range(t)])
    expected = np.zeros((t, hidden))
    for i in range(t):
        for expert, weight in zip(chosen[i], weights[i], strict=True):
            gate, up, down = (experts[key][first + expert] for key in shapes)
            inside = gate @ x[i]
            expected[i] += weight * down @ (inside / (1 + np.exp(-inside)) * (up @ x[i]))
    found = jax.jit(model.apply_experts, static_argnums=4)(
        jnp.float32(x),
        jnp.int32(chosen),
        jnp.float32(weights),
        jax.tree.map(jnp.float32, experts),
        n,
        first,
    )
    assert oracle.error(found, expected) < 1e-6


def test_every_second_layer_a_mixture():
    config = model.Config.from_hf(V3 | {"num_hidden_layers": 6, "moe_layer_freq": 2})
    assert config.mixture_layers == (False, False, True, False, True, False)
    assert config.runs[:2] == [(False, range(0, 2)), (True, range(2, 3))]
    without = {**V2, "n_routed_experts": None}
    assert model.Config.from_hf(without).runs == [(False, range(0, 2))]


# ---------------------------------------------------------------------------------------------
# Checkpoints


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sharded_with_what_is_skipped(loaded, tmp_path):
    extra = {
        f"model.layers.{loaded.config.num_layers}.eh_proj.weight": np.ones((2, 2), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    folder = write(tmp_path / "sharded", loaded.hf, loaded.tensors | extra, shards=3)
    params, config = checkpoint.load(folder)
    assert config == loaded.config
    same(params, loaded.params)


def test_bfloat16_checkpoint_and_other_dtype(tmp_path):
    narrow = {k: v.astype(jnp.bfloat16) for k, v in make_tensors(V3).items()}
    for name in narrow:
        if name.endswith("bias"):
            narrow[name] = narrow[name].astype(np.float32)
    folder = write(tmp_path / "bf16", V3 | {"torch_dtype": "bfloat16"}, narrow)
    params, config = checkpoint.load(folder)
    assert config.attention.dtype == jnp.bfloat16
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    assert dtypes == {"bfloat16", "float32"}  # the router's
    wide, config = checkpoint.load(folder, jnp.float32)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide)} == {"float32"}
    assert config.attention.dtype == jnp.float32
    same(jax.tree.map(lambda x: x.astype(jnp.float32), params), wide)


def test_tied_embeddings(tmp_path):
    hf = V2 | {"tie_word_embeddings": True}
    params, _ = checkpoint.load(write(tmp_path / "tied", hf, make_tensors(hf)))
    same(params["embed"], params["unembed"])


QUANTISATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 24],
}


def quantise(tensors, block=(16, 24)):
    """Matrices of the layers in FP8 with a scale for each block, and what they then stand for."""
    stored, exact = {}, {}
    for name, value in tensors.items():
        stored[name] = exact[name] = value
        if value.ndim != 2 or "layers" not in name or name.endswith("mlp.gate.weight"):
            continue
        scales = np.zeros([-(-n // b) for n, b in zip(value.shape, block, strict=True)], np.float32)
        codes, exact[name] = np.zeros(value.shape, jnp.float8_e4m3fn), np.zeros_like(value)
        for i, j in np.ndindex(*scales.shape):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(value[part]).max() / 448
            codes[part] = (value[part] / scales[i, j]).astype(jnp.float8_e4m3fn)
            exact[name][part] = codes[part].astype(np.float32) * scales[i, j]
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
    return stored, exact


def test_fp8_blocks(tmp_path):
    # No size of the matrices is a multiple of both sides of a block.
    stored, exact = quantise(make_tensors(V3))
    assert any(v.shape[0] % 16 and v.shape[1] % 24 for k, v in stored.items() if v.ndim == 2)
    quantised = write(
        tmp_path / "fp8", V3 | {"quantization_config": QUANTISATION}, stored, shards=2
    )
    params, _ = checkpoint.load(quantised)
    expected, _ = checkpoint.load(write(tmp_path / "exact", V3, exact))
    same(params, expected)
    # In bfloat16, rounded once.
    params, _ = checkpoint.load(quantised, jnp.bfloat16)
    gate = params["runs"][1]["experts"]["gate"]
    rounded = exact["model.layers.2.mlp.experts.3.gate_proj.weight"].astype(jnp.bfloat16)
    same(gate[1, 3], rounded)


def test_fp8_of_the_public_block_size():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((200, 300)).astype(jnp.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (2, 3)).astype(np.float32)
    found = checkpoint.dequantise("w", weight, scale, (128, 128))
    for i, j in [(0, 0), (127, 128), (128, 127), (199, 299), (150, 255), (3, 256)]:
        assert found[i, j] == np.float32(weight[i, j]) * scale[i // 128, j // 128]


LAYER = "model.layers.1.self_attn"


def without(name):
    return lambda config, tensors: tensors.pop(name)


def change(**values):
    return lambda config, tensors: config.update(values)


BAD = {
    "missing tensor": (without(f"{LAYER}.o_proj.weight"), f"1 tensors are missing: {LAYER}.o_proj"),
    "missing expert": (
        without("model.layers.2.mlp.experts.7.up_proj.weight"),
        "missing: model.layers.2.mlp.experts.7.up_proj.weight",
    ),
    "extra tensor": (
        lambda config, tensors: tensors.update({f"{LAYER}.q_norm.weight": np.ones(2, np.float32)}),
        f"1 tensors belong to no layer of the model: {LAYER}.q_norm.weight",
    ),
    "shape": (
        lambda config, tensors: tensors.update({"model.norm.weight": np.ones(31, np.float32)}),
        r"'model.norm.weight' has shape \(31,\); expected \(32,\)",
    ),
    "scales missing": (
        lambda config, tensors: tensors.update(
            {f"{LAYER}.o_proj.weight": tensors[f"{LAYER}.o_proj.weight"].astype(jnp.float8_e4m3fn)}
        ),
        f"'{LAYER}.o_proj.weight' is FP8 and its scales",
    ),
    "scales without configuration": (
        lambda config, tensors: tensors.update(
            {f"{LAYER}.o_proj.weight_scale_inv": np.ones((1, 1), np.float32)}
        ),
        "has scales, but config.json has no 'quantization_config'",
    ),
    "scales of another shape": (
        lambda config, tensors: (
            config.update(quantization_config=QUANTISATION),
            tensors.update({f"{LAYER}.o_proj.weight_scale_inv": np.ones((1, 1), np.float32)}),
        ),
        r"o_proj.weight_scale_inv' has shape \(1, 1\); expected \(2, 1\)",
    ),
    "quantisation": (
        change(quantization_config={"quant_method": "awq", "bits": 4}),
        "'quantization_config' is .*awq.* not implemented",
    ),
    "model type": (change(model_type="llama"), "model_type is 'llama'; this example runs deepseek"),
    "V3.2": (change(model_type="deepseek_v32"), "model_type is 'deepseek_v32'"),
    "activation": (change(hidden_act="gelu"), "'hidden_act' is 'gelu', which is not implemented"),
    "bias": (change(attention_bias=True), "'attention_bias' is True"),
    "router": (change(topk_method="hash"), "'topk_method' is 'hash', which is not implemented"),
    "scores": (change(scoring_func="softmax"), "'scoring_func' is 'softmax'.* expected 'sigmoid'"),
    "groups": (change(n_group=3), "n_routed_experts=8 does not divide into n_group=3"),
    "too many experts": (change(num_experts_per_tok=5), "5 experts cannot be chosen from topk"),
    "one expert": (change(num_experts_per_tok=1), "'norm_topk_prob' is true"),
    "no hidden size": (lambda config, tensors: config.pop("hidden_size"), "key 'hidden_size'"),
    "no groups": (lambda config, tensors: config.pop("n_group"), "key 'n_group' is missing"),
    "no vocabulary": (lambda config, tensors: config.pop("vocab_size"), "key 'vocab_size'"),
    "key heads": (change(num_key_value_heads=1), "'num_key_value_heads' is 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints_say_what_is_wrong(what, tmp_path):
    spoil, message = BAD[what]
    config, tensors = dict(V3), make_tensors(V3)
    spoil(config, tensors)
    with pytest.raises(model.CheckpointError, match=message):
        checkpoint.load(write(tmp_path / "bad", config, tensors))


def test_bad_folders(tmp_path):
    with pytest.raises(model.CheckpointError, match="has no config.json"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(V3))
    with pytest.raises(model.CheckpointError, match="neither model.safetensors nor"):
        checkpoint.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(model.CheckpointError, match="model.safetensors cannot be read"):
        checkpoint.load(tmp_path)
    folder = write(tmp_path / "sharded", V3, make_tensors(V3), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(model.CheckpointError, match="model-00002-of-00002.safetensors is missing"):
        checkpoint.load(folder)


# ---------------------------------------------------------------------------------------------
# The real sizes, without arrays

PUBLIC = {
    "V2-Lite": V2
    | {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
    },
    "V3": V3
    | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
    },
}
PUBLIC_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


@pytest.mark.parametrize(("name", "billions"), [("V2-Lite", 15.7), ("V3", 671.0)])
def test_public_models_have_their_number_of_parameters(name, billions):
    shapes = checkpoint.expected_shapes(model.Config.from_hf(PUBLIC[name] | PUBLIC_LATENT))
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(billions, abs=0.05)


def test_v3_compiles_in_seconds_and_copies_no_experts():
    # In float32: for bfloat16, older CPU compilers convert all matrices before the loop.
    config = model.Config.from_hf(PUBLIC["V3"] | PUBLIC_LATENT)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def mlp(*lead, columns):
        shapes = {"gate": (columns, 7168), "up": (columns, 7168), "down": (7168, columns)}
        return {name: array(*lead, *shape) for name, shape in shapes.items()}

    def run(is_mixture, layers):
        n = len(layers)
        attention = {k: array(n, *s) for k, s in param_shapes(config.attention).items()}
        weights = {"attention": attention, "mlp": mlp(n, columns=2048 if is_mixture else 18432)}
        weights |= {"attention_norm": array(n, 7168), "mlp_norm": array(n, 7168)}
        if is_mixture:
            weights |= {"router": array(n, 256, 7168), "router_bias": array(n, 256)}
            weights["experts"] = mlp(n, 256, columns=2048)
        return weights

    params = {
        "embed": array(129280, 7168),
        "runs": [run(*kind_and_layers) for kind_and_layers in config.runs],
        "norm": array(7168),
        "unembed": array(129280, 7168),
    }
    cache = jax.eval_shape(lambda: empty_cache(config.attention, 64, 64, num_layers=61))
    b, int32 = 8, jnp.int32
    step = functools.partial(generate.decode_step, config=config, axis=None, implementation=None)
    compiled = (
        jax.jit(step, donate_argnums=1)
        .lower(
            params,
            cache,
            array(b, 8, dtype=int32),
            array(b, dtype=int32),
            array(b),
            array(b, dtype=int32),
            array(b, dtype=int32),
        )
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > 2.6e12
    assert memory.temp_size_in_bytes < 8e9  # the experts of one layer are 45e9
    assert memory.alias_size_in_bytes == math.prod(cache.data.shape) * 4  # nor the cache


# ---------------------------------------------------------------------------------------------
# Several devices


def test_a_mesh_generates_the_same_tokens(models):
    loaded = models("v3")
    mesh = parallel.make_mesh(2, 4)
    params, config = checkpoint.load(loaded.folder, mesh=mesh)
    experts = params["runs"][-1]["experts"]["gate"]
    assert experts.addressable_shards[0].data.shape[2] == 16 // 4  # a part of its columns
    # Requests need 5, 3, 2 and 4 pages: on each device there is room for at most three of them.
    engine = engine_of(params, config, max_batch=4, num_pages=9, mesh=mesh)
    cache = engine.cache.data
    assert cache.addressable_shards[0].data.shape[0] == 9 * config.num_layers == len(cache) // 2
    expected, found = requests_of(), requests_of()
    loaded.engine.generate(expected)
    engine.generate(found)
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    assert len(engine.programs) == 2
    assert [pages.free_pages for pages in engine.pages] == [9, 9]


def test_meshes_that_do_not_fit(models):
    with pytest.raises(ValueError, match="there are 8 devices"):
        parallel.make_mesh(3, 3)
    with pytest.raises(model.CheckpointError, match="does not divide among 3 devices"):
        checkpoint.load(models("v3").folder, mesh=parallel.make_mesh(1, 3))


# ---------------------------------------------------------------------------------------------
# The program


def run(*arguments, devices=2):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # The package that the tests import, installed or not.
        "PYTHONPATH": str(Path(jax_flashmla.__file__).parents[1]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(EXAMPLE / "generate.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_program(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tensors = make_tensors(V2)
    folder = write(tmp_path / "v2", V2, tensors)
    words = {f"w{i}": i for i in range(48)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": {"content": "w1"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = run(
        folder, "--prompt", "w5 w6 w7", "--token-ids", "1,5,6,7", "--max-new-tokens", "6",
        "--page-size", "8", "--mesh", "1,2", "--implementation", "xla",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "--- w5 w6 w7" and lines[2] == "--- [1, 5, 6, 7]"
    tokens = [int(number) for number in lines[3].split(",")]
    assert lines[1].split() == [f"w{token}" for token in tokens]
    assert_greedy(V2, tensors, [1, 5, 6, 7], tokens)
    assert "tokens/s" in done.stderr and "compiled 2 programs" in done.stderr


def test_the_program_says_what_is_wrong(tmp_path):
    done = run(tmp_path, "--prompt", "hello")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path} has no config.json" in done.stderr
