"""run_steps is lax.scan in either form, compiles once per function, and keeps its argument."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.runtime.loop import prefers_scan, run_steps


def _step(carry, x):
    total, count = carry
    total = total * 0.9 + x["a"]
    return (total, count + 1), {"total": total.sum(), "count": count}


def _inputs(n=5):
    carry = (jnp.arange(3.0), jnp.zeros((), jnp.int32))
    return carry, {"a": np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)}


def test_host_loop_and_scan_agree():
    carry, xs = _inputs()
    expected = jax.lax.scan(_step, carry, jax.tree.map(jnp.asarray, xs))
    for scan in (False, True, None):
        chex.assert_trees_all_close(run_steps(_step, carry, xs, scan=scan), expected, rtol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_fixed_is_read_by_every_step_and_not_given_up(scan):
    def step(carry, x, fixed):
        return carry + x * fixed["factor"], None

    fixed = {"factor": jnp.float32(3.0)}
    carry, _ = run_steps(step, jnp.zeros(()), jnp.arange(4.0), fixed=fixed, scan=scan, donate=True)
    assert float(carry) == 18.0
    assert not fixed["factor"].is_deleted()
    carry, _ = run_steps(step, carry, jnp.arange(4.0), fixed=fixed, scan=scan, donate=True)
    assert float(carry) == 36.0


def test_the_backend_decides():
    assert prefers_scan() == (jax.default_backend() != "cpu")


@pytest.mark.parametrize("scan", [False, True])
def test_one_trace_for_many_calls(scan):
    traces = []

    def step(carry, x):
        traces.append(scan)
        return carry + x, None

    carry = jnp.zeros(2)
    for _ in range(3):
        carry, ys = run_steps(step, carry, jnp.ones((4, 2)), scan=scan)
    assert ys is None
    assert len(traces) == 1
    np.testing.assert_array_equal(carry, [12.0, 12.0])


@pytest.mark.parametrize("scan", [False, True])
def test_the_callers_carry_stays_valid_unless_donated(scan):
    carry = jnp.ones(3)
    # One buffer twice: donating it as it is would be an error.
    run_steps(lambda c, x: ((c[0] + x, c[1]), None), (carry, carry), jnp.ones(2), scan=scan)
    np.testing.assert_array_equal(carry, np.ones(3))
    run_steps(lambda c, x: (c + x, None), carry, jnp.ones(2), scan=scan, donate=True)
    assert carry.is_deleted()


@pytest.mark.parametrize("scan", [False, True])
def test_without_xs(scan):
    carry, ys = run_steps(lambda c, _: (c * 2, c), jnp.float32(1), length=4, scan=scan)
    assert float(carry) == 16.0
    np.testing.assert_array_equal(ys, [1, 2, 4, 8])
    assert run_steps(_step, carry, length=0) == (carry, None)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        run_steps(_step, 0, {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        run_steps(_step, 0, jnp.zeros(2), length=4)
    with pytest.raises(ValueError, match=r"\[\]"):
        run_steps(_step, 0)
