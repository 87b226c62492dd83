"""The DeepSeek example computes what Hugging Face transformers computes.

Each case is a small model of transformers with random parameters, written by its
``save_pretrained`` and read by the example. Everything is float32 on CPUs. ``pytest -s`` prints the
largest errors.
"""

from __future__ import annotations

import dataclasses
import functools

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import checkpoint, generate, model

from jax_flashmla.flax import core, empty_cache

pytestmark = pytest.mark.parity

PROMPT, STEPS, PAGE = 24, 64, 16
BOUND = 1e-4  # of the largest |expected value|


@dataclasses.dataclass
class Case:
    theirs: object
    params: dict
    config: model.Config
    tokens: np.ndarray  # prompt and greedy continuation, by transformers
    logits: np.ndarray  # of the whole sequence, by transformers
    layers: list  # inputs and outputs of the layers on the way
    attention: list  # and of their attention


@pytest.fixture(scope="module", params=hf_models.CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = hf_models.build(request.param)
    theirs.save_pretrained(folder)
    params, config = checkpoint.load(folder)
    rng = np.random.default_rng(7)
    prompt = torch.tensor(rng.integers(0, hf_models.SHAPE["vocab_size"], (1, PROMPT)))
    layers, attention, hooks = [], [], []

    def record(into):
        def hook(_, args, kwargs, result):
            x = args[0] if args else kwargs["hidden_states"]
            out = result[0] if isinstance(result, tuple) else result
            into.append((x[0].numpy().copy(), out[0].numpy().copy()))

        return hook

    with torch.no_grad():
        tokens = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=STEPS, do_sample=False
        )
        for layer in theirs.model.layers:
            hooks += [
                layer.register_forward_hook(record(layers), with_kwargs=True),
                layer.self_attn.register_forward_hook(record(attention), with_kwargs=True),
            ]
        logits = theirs(tokens, use_cache=False).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return Case(theirs, params, config, tokens[0].numpy(), logits, layers, attention)


def check(what, actual, expected):
    error = np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected))
    print(f"{what}: {error:.1e}")
    assert error <= BOUND


def new_cache(config):
    pages = -(-(PROMPT + STEPS) // PAGE)
    table = np.random.default_rng(1).permutation(pages).astype(np.int32)[None]
    return empty_cache(config.attention, pages, PAGE, num_layers=config.num_layers), table


def test_the_case_is_not_trivial(case):
    assert len(np.unique(case.tokens[PROMPT:])) > 8
    assert case.logits.std() > 0.3
    assert case.config.attention.dtype == np.float32


def test_logits_of_the_full_sequence_and_step_by_step(case):
    n, params = len(case.tokens), case.params
    tokens = case.tokens.astype(np.int32)
    prefill = jax.jit(functools.partial(model.prefill, config=case.config))
    cache, table = new_cache(case.config)
    hidden, _ = prefill(params, tokens, np.array([0, n], np.int32), cache, table)
    check("full sequence", model.logits(params, hidden), case.logits)

    # Of the prompt only; what follows it is padding, and replaced to show that.
    prompt = np.where(np.arange(n) < PROMPT, tokens, 0)
    hidden, cache = prefill(params, prompt, np.array([0, PROMPT], np.int32), cache, table)
    decode = jax.jit(functools.partial(model.decode, config=case.config), donate_argnums=3)
    found = [*hidden[:PROMPT]]
    for position in range(PROMPT, n):
        at = np.array([[position]], np.int32)
        hidden, cache = decode(params, tokens[at], at, cache, table)
        found.append(hidden[0, 0])
    found = model.logits(params, jnp.stack(found))
    check("step by step", found, case.logits)
    # By induction, greedy decoding takes the same tokens.
    assert np.argmax(found, axis=-1)[PROMPT - 1 : -1].tolist() == tokens[PROMPT:].tolist()


def test_the_engine_generates_the_same_tokens(case):
    prompt = case.tokens[:PROMPT].tolist()
    request = generate.Request(prompt, STEPS)
    other = generate.Request(prompt[5:9], 11)  # for company
    engine = generate.Engine(
        case.params, case.config, max_batch=2, max_length=request.longest, page_size=PAGE
    )
    engine.generate([other, request])
    assert request.tokens == case.tokens[PROMPT:].tolist()


def layers_of(case):
    """Parameters of each layer, still with an axis of layers in front."""
    for run, (_, layers) in zip(case.params["runs"], case.config.runs, strict=True):
        for i, number in enumerate(layers):
            yield jax.tree.map(lambda w, i=i: w[i : i + 1], run), number


def test_layer_by_layer(case):
    limits = jnp.array([0, len(case.tokens)], jnp.int32)

    def attend(weights, x, cache, layer):
        return core.prefill(weights, x, limits, config=case.config.attention).out, cache

    @jax.jit
    def one_layer(params, x):
        return model.run_layers(params, range(1), x, None, attend, case.config)[0]

    for (params, number), (x, expected) in zip(layers_of(case), case.layers, strict=True):
        check(f"layer {number}", one_layer(params, x), expected)


def test_attention_layer_by_layer(case):
    config = case.config.attention
    n = len(case.tokens)
    prefill = jax.jit(functools.partial(core.prefill, config=config))
    decode = jax.jit(functools.partial(core.decode, config=config), donate_argnums=3)
    for (params, number), (x, expected) in zip(layers_of(case), case.attention, strict=True):
        weights = jax.tree.map(lambda w: w[0], params["attention"])
        out = prefill(weights, x, np.array([0, n], np.int32)).out
        check(f"attention {number}, expanded", out, expected)

        _, table = new_cache(case.config)
        cache, found = empty_cache(config, table.size, PAGE), []
        for begin in range(0, n, 8):  # absorbed, 8 tokens a step
            positions = np.arange(begin, begin + 8, dtype=np.int32)[None]
            out, cache = decode(weights, x[None, begin : begin + 8], positions, cache, table)
            found.append(out[0])
        check(f"attention {number}, absorbed", jnp.concatenate(found), expected)
