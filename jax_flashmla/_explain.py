"""``explain``: which implementation a call takes, and why the others decline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax_flashmla import _dispatch


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> _dispatch.Explanation:
    """Says which implementation a call takes on JAX's default backend and why the others decline.

    Nothing is computed: the call is traced on the shapes of its arguments.

    Args:
        op: a public function of ``jax_flashmla``, `PagedKVCache.append` or `PagedKVCache.gather`
            (then the cache is the first of args), or its name.
        *args: what it would be called with; arrays may be ``jax.ShapeDtypeStruct``.
        **kwargs: likewise.

    Returns:
        An explanation to print, or to ask for ``.implementation`` ("cuda", "xla", or None if the
        call raises NotImplementedError) and ``.operations``.

    Raises:
        ValueError: ``op`` is no public function, or the call itself is invalid.
    """
    import jax_flashmla

    public = {
        name: value
        for name, value in vars(jax_flashmla).items()
        if not name.startswith("_") and callable(value) and not isinstance(value, type)
    }
    public.pop("explain", None)
    cache = jax_flashmla.PagedKVCache
    public |= {method.__qualname__: method for method in (cache.append, cache.gather)}
    name = op if isinstance(op, str) else getattr(op, "__qualname__", repr(op))
    function = public.get(name)
    if function is None or not (isinstance(op, str) or op is function):
        raise ValueError(
            f"explain: argument 'op' is {op!r}; expected a function of jax_flashmla or its name: "
            f"{', '.join(sorted(public))}"
        )
    return _dispatch.explain_call(name, function, args, kwargs)
