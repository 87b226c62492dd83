"""Greedy decoding with multi-head latent attention (MLA) over a paged cache.

    python examples/decode_loop.py --batch 4 --steps 32

A model of random weights with two layers: each token leaves one latent and one RoPE key in the
cache, shared by all heads. Prompts of different lengths are processed in one call; then every
request grows by a token a step, and takes a page from the free list when its last one is full.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import (
    PagedKVCache,
    flash_mla_with_kvcache,
    get_mla_metadata,
    offset_block_table,
    offset_slots,
    slot_mapping,
)

LAYERS, MODEL, HEADS, VOCABULARY = 2, 256, 16, 1000
LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128  # per head, as in DeepSeek V3
PAGE = 64  # tokens of a page


def make_weights(key, dtype=jnp.bfloat16):
    """Random weights; those of the layers are stacked along axis 0."""
    shapes = {
        "query": (LAYERS, MODEL, HEADS, NOPE + ROPE),
        "down": (LAYERS, MODEL, LATENT + ROPE),  # what the cache stores of a token
        "up_key": (LAYERS, LATENT, HEADS, NOPE),  # latent -> keys of each head
        "up_value": (LAYERS, LATENT, HEADS, VALUE),  # latent -> values of each head
        "output": (LAYERS, HEADS * VALUE, MODEL),
    }
    keys = jax.random.split(key, len(shapes) + 1)
    layers = {
        name: (jax.random.normal(k, shape) * shape[1] ** -0.5).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    embed, unembed = (0.02 * jax.random.normal(keys[-1], (2, VOCABULARY, MODEL))).astype(dtype)
    return {"layers": layers, "embed": embed, "unembed": unembed}


def normalise(x):
    """RMS norm without weights, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def rotate(x, positions):
    """RoPE: x [b, s, ..., ROPE] turned by angles that grow with the position [b, s]."""
    frequencies = 10000.0 ** -(jnp.arange(0, ROPE, 2) / ROPE)
    angles = positions.reshape(*positions.shape, *(1,) * (x.ndim - 2)) * frequencies
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def forward(cache, weights, tokens, positions, block_table, *, pages):
    """Processes s tokens of each request, int32[b, s]; returns the cache and the next tokens.

    Padding comes first and has negative positions. ``pages`` is the number of pages of one layer:
    all layers share one cache, in which pages of layer l are ``l * pages`` and up.
    """
    s = tokens.shape[1]
    lengths = positions[:, -1] + 1  # in the cache once this call has written its tokens
    # Made once, used by every layer.
    schedule = get_mla_metadata(lengths, s * HEADS, 1)
    slots = slot_mapping(block_table, positions, PAGE, num_pages=pages)  # -1 for padding

    def layer(carry, inputs):
        x, cache = carry
        first_page, w = inputs
        hidden = normalise(x)
        kv = hidden @ w["down"]
        latent, key_rope = normalise(kv[..., :LATENT]), rotate(kv[..., LATENT:], positions)
        cache = cache.append(
            latent, offset_slots(slots, first_page, num_pages=pages, page_size=PAGE), k_pe=key_rope
        )
        q = jnp.einsum("bsm,mhd->bshd", hidden, w["query"])
        # Absorption: q . (latent @ up_key) = (q @ up_key^T) . latent, so that no keys are made.
        q_latent = jnp.einsum("bshn,lhn->bshl", q[..., :NOPE], w["up_key"])
        out, _ = flash_mla_with_kvcache(
            jnp.concatenate([q_latent, rotate(q[..., NOPE:], positions)], axis=-1),
            cache,
            offset_block_table(block_table, first_page, num_pages=pages),
            lengths,
            LATENT,
            *schedule,
            softmax_scale=(NOPE + ROPE) ** -0.5,  # of the head dimensions before absorption
            causal=True,
        )
        values = jnp.einsum("bshl,lhv->bshv", out, w["up_value"])
        return (x + values.reshape(*x.shape[:2], -1) @ w["output"], cache), None

    first_pages = pages * jnp.arange(LAYERS, dtype=jnp.int32)
    x = weights["embed"][tokens]
    (x, cache), _ = jax.lax.scan(layer, (x, cache), (first_pages, weights["layers"]))
    logits = normalise(x[:, -1]) @ weights["unembed"].T
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)


def generate(weights, prompts, steps, dtype=jnp.bfloat16):
    """Greedy continuations, int32[b, steps], of prompts: a list of int32 arrays, none empty."""
    lengths = np.array([len(prompt) for prompt in prompts])
    pages = int(np.sum(-(-(lengths + steps) // PAGE)))
    free = list(np.random.default_rng(0).permutation(pages))  # any order will do
    table = np.full((len(prompts), -(-(lengths.max() + steps) // PAGE)), -1, np.int32)

    def reserve():
        for row, length in zip(table, lengths, strict=True):
            for column in range(np.count_nonzero(row >= 0), -(-length // PAGE)):
                row[column] = free.pop()
        return table.copy()  # the step may still be reading while the table grows

    cache = PagedKVCache.zeros(LAYERS * pages, PAGE, dtype=dtype)
    # Donating the cache lets the step write into it; otherwise each step would copy it.
    step = jax.jit(functools.partial(forward, pages=pages), donate_argnums=0)

    longest = lengths.max()
    tokens = np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts]).astype(np.int32)
    positions = np.arange(longest) - (longest - lengths)[:, None]
    cache, chosen = step(cache, weights, tokens, positions.astype(np.int32), reserve())
    results = [chosen]
    for _ in range(steps - 1):
        lengths += 1
        positions = (lengths - 1)[:, None].astype(np.int32)
        cache, chosen = step(cache, weights, chosen[:, None], positions, reserve())
        results.append(chosen)  # not read here, so that steps follow each other without a pause
    return np.stack([np.asarray(r) for r in results], axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="requests (default 4)")
    parser.add_argument("--steps", type=int, default=32, help="tokens to generate (default 32)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, n) for n in rng.integers(1, 200, options.batch)]
    results = generate(make_weights(jax.random.key(0)), prompts, options.steps)
    for prompt, result in zip(prompts, results, strict=True):
        print(f"prompt of {len(prompt)} tokens:", *result)
