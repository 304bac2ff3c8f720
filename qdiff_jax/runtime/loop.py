"""One function that runs a step many times, in the form that suits the backend.

On GPU and TPU the steps are one `lax.scan`: a single dispatch. On CPU they are a host loop over
one jitted step. The reason is XLA:CPU: inside a `while` loop (which a scan becomes) a convolution
cannot use the library kernel and falls to a naive one. Measured on two cores: weight gradients
30-60 times slower, input gradients 3 times; matrix products are not affected, so a model without
convolutions may ask for `scan=True`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def prefers_scan() -> bool:
    """Whether loops over steps should be scans on the default backend: everywhere but on CPU."""
    return jax.default_backend() != "cpu"


def run_steps(
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    scan: bool | None = None,
    donate: bool = False,
    fixed: Any = None,
) -> tuple[Any, Any]:
    """Runs `carry, y = step(carry, x)` over the leading axis of xs, like `lax.scan`.

    The step is compiled once per function object: pass the same one again (a module-level
    function, or a closure made once) and nothing is compiled; a lambda made in a loop compiles
    each time.

    Args:
      step: pure function (carry, x) -> (carry, y). It is jitted here.
      carry: any pytree of arrays.
      xs: pytree whose leaves share a leading axis, or None together with `length`.
      length: number of steps; only needed without xs.
      scan: True for one `lax.scan`, False for a host loop; None lets the backend decide.
      donate: give the carry's buffers up to the first step, so that it is not copied. The caller's
        carry must not be used afterwards. Without it the carry stays valid, at the price of one
        copy.
      fixed: arrays that every step reads and none changes; they are handed to `step(carry, x, fixed)` as
        they are, neither copied nor given up. None: the step takes two arguments.

    Returns:
      (carry, ys): ys stacked along a new leading axis, None where step returns None (or for no
      steps).

    Raises:
      ValueError: xs of unequal lengths, or a length that contradicts xs.
    """
    count = _length(xs, length)
    if count == 0:
        return carry, None
    rest = () if fixed is None else (fixed,)
    if not donate:
        carry = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), carry)
    if prefers_scan() if scan is None else scan:
        return _scanned(step)(carry, xs, rest, count)
    jitted = _stepped(step)
    several = any(len(leaf.devices()) > 1 for leaf in jax.tree.leaves(carry) if _is_array(leaf))
    outputs = []
    for i in range(count):
        carry, y = jitted(carry, jax.tree.map(lambda leaf: leaf[i], xs), *rest)  # noqa: B023
        outputs.append(y)
        if several:
            # Two runs in flight over several CPU devices can each hold the thread the other waits for.
            jax.block_until_ready(carry)
    # Fetched at the end only: asking for a value earlier would stop the dispatch of the next steps.
    fetched = jax.device_get(outputs)
    return carry, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *fetched)


# Bounded: a compiled step is held here, and with it whatever its function closes over.
@functools.lru_cache(maxsize=64)
def _stepped(step):
    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=64)
def _scanned(step):
    def run(carry, xs, rest, count):
        return jax.lax.scan(lambda c, x: step(c, x, *rest), carry, xs, length=count)

    return jax.jit(run, donate_argnums=0, static_argnums=3)


def _is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _length(xs: Any, length: int | None) -> int:
    lengths = {int(np.shape(leaf)[0]) for leaf in jax.tree.leaves(xs)}
    if length is not None:
        lengths.add(length)
    if len(lengths) != 1:
        raise ValueError(
            f"run_steps needs one number of steps, but xs and length say {sorted(lengths)}; "
            "give xs leaves with equal leading axes, or length alone."
        )
    return lengths.pop()
