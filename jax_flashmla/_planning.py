"""How many parts a call's work is divided into: a pure function of shapes and the SM count.

Both ``get_mla_metadata`` and calls that plan for themselves use it, so the two agree.
"""

from __future__ import annotations

from jax_flashmla import _dispatch

DEFAULT_SM_COUNT = 132  # H100 SXM and H200
ROWS = 64  # query rows in one tile of the kernels


def dense_row_tiles(num_heads_k: int, num_q_tokens_per_head_k: int) -> int:
    """Tiles of query rows in dense decoding: rows are query tokens times heads of one KV head."""
    return num_heads_k * -(-num_q_tokens_per_head_k // ROWS)


def sparse_row_tiles(num_heads_k: int, num_heads_q: int, s_q: int) -> int:
    """Tiles of query rows in sparse decoding: query tokens select differently and share no tile."""
    return num_heads_k * s_q * -(-(num_heads_q // num_heads_k) // ROWS)


def default_num_sm_parts(row_tiles: int, sm_count: int | None = None) -> int:
    """Rows of a schedule: one part for each SM and row tile that fit on the GPU at once.

    Args:
        row_tiles: from :func:`dense_row_tiles` or :func:`sparse_row_tiles`.
        sm_count: multiprocessors; by default those of this process' first CUDA device, else 132.
            A schedule made for another GPU is right, only less balanced.
    """
    if sm_count is None:
        devices = _dispatch.cuda_devices()
        sm_count = getattr(devices[0], "core_count", None) if devices else None
    return max((sm_count or DEFAULT_SM_COUNT) // max(row_tiles, 1), 1)
