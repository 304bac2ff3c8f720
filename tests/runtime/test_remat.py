"""Recomputing in the backward pass: the same gradients, and less kept for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.runtime.remat import after, recomputed

WIDTH, DEPTH = 16, 6


@functools.cache
def example():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((DEPTH, WIDTH, WIDTH)).astype(np.float32) / 4
    return rng.standard_normal((64, WIDTH)).astype(np.float32), weights


def layers(x, weights):
    """Several intermediate values, each needed for the gradient."""
    for weight in weights:
        x = jnp.tanh(x @ weight) + jnp.sin(x)
    return x


def plain(x, weights):
    return jnp.sum(layers(x, weights) ** 2)


def light(x, weights):
    return jnp.sum(recomputed(layers, x, weights) ** 2)


def test_values_and_gradients_are_those_of_the_plain_function():
    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(*example()) for f in (light, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_nothing_but_the_arguments_is_kept():
    def kept(f):
        residuals = jax.tree.leaves(
            jax.eval_shape(lambda *given: jax.vjp(f, *given)[1], *example())
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

    arguments = sum(array.nbytes for array in example())
    light_bytes = kept(lambda x, w: recomputed(layers, x, w))
    assert light_bytes <= arguments
    assert kept(layers) > arguments + DEPTH * example()[0].nbytes


def test_the_compiler_does_not_merge_the_second_computation_with_the_first():
    """A chain of blocks: kept whole, every block's inside is there at once."""

    def chain(step):
        def loss(x, weights):
            for weight in weights:
                x = x + step(x, weight[None].repeat(DEPTH, 0))
            return jnp.sum(x**2)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*big).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    x, weights = example()
    big = np.tile(x, (64, 1)), weights
    assert chain(functools.partial(recomputed, layers)) < 0.6 * chain(layers)


def test_what_must_come_after_keeps_its_values():
    x, weights = example()
    tree = {"x": x, "n": np.arange(3)}
    waited = after(tree, jnp.float32([1.0, jnp.nan]))
    jax.tree.map(np.testing.assert_array_equal, waited, tree)
    lost = after(tree, jnp.float32([jnp.nan]))
    assert np.isnan(lost["x"]).all()
    np.testing.assert_array_equal(lost["n"], tree["n"])
    begun = recomputed(layers, x, weights, jnp.float32([2.0]))
    np.testing.assert_allclose(begun, recomputed(layers, x, weights), rtol=1e-5, atol=1e-6)


def test_integers_beside_the_arrays_have_no_gradient():
    x, weights = example()

    def picked(tied, w):
        values, row = tied
        return layers(values, w)[row]

    rows = np.int32([3, 5])
    found = jax.grad(lambda v: jnp.sum(recomputed(picked, (v, rows), weights)))(x)
    expected = jax.grad(lambda v: jnp.sum(picked((v, rows), weights)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert not found[0].any()
