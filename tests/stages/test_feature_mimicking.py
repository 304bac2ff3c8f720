"""LRM: what it follows, what it does not see, and where its directions come from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.stages.block_groups import image_blocks, tapped_program
from qdiff_jax.stages.feature_mimicking import leading_directions, mimicking_loss, projections

from . import chain


def features(seed=0):
    """[2, 5, 5, 32] whose first 8 channels vary most."""
    spread = np.r_[np.full(8, 5.0), np.full(24, 0.1)]
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, 5, 5, 32)) * spread).astype(np.float32)


def axes(full):
    rows = full.reshape(-1, full.shape[-1])
    return jnp.asarray(leading_directions(rows.T @ rows, 4))


def test_perturbations_orthogonal_to_the_directions_cost_nothing():
    full = features()
    held = axes(full)
    assert held.shape == (32, 8)
    noise = np.random.default_rng(1).standard_normal(full.shape).astype(np.float32)
    minor = noise - noise @ held @ held.T
    assert float(mimicking_loss([full + minor], [full], [held])) < 1e-10
    # Along them: mean over 8 directions of unit noise.
    assert float(mimicking_loss([full + noise], [full], [held])) == pytest.approx(1.0, rel=0.2)


def test_the_channel_axis_is_the_last():
    """The same features with height and width exchanged, or shuffled over positions, cost the same; with
    channels exchanged against another axis they do not."""
    full, held = features(), axes(features())
    made = full + features(2)
    cost = float(mimicking_loss([made], [full], [held]))
    moved = float(mimicking_loss([made.swapaxes(1, 2)], [full.swapaxes(1, 2)], [held]))
    assert moved == pytest.approx(cost, rel=1e-5)
    by_hand = np.mean(((made - full).reshape(-1, 32) @ np.asarray(held)) ** 2)
    assert cost == pytest.approx(float(by_hand), rel=1e-4)
    # As high as it has channels, so that both orders have a product with the directions.
    tall, change = (np.resize(features(s), (2, 32, 5, 32)) for s in (0, 2))
    exchanged = [value.swapaxes(1, 3) for value in (tall + change, tall)]
    along = float(mimicking_loss([tall + change], [tall], [held]))
    across = float(mimicking_loss(exchanged[:1], exchanged[1:], [held]))
    assert across < 0.5 * along


def test_the_rank_is_a_share_of_the_channels_rounded_up():
    for channels, divisor, rank in ((32, 4, 8), (6, 4, 2), (3, 4, 1), (5, 1, 5)):
        held = leading_directions(np.diag(np.arange(channels) + 1.0), divisor)
        assert held.shape == (channels, rank)
        np.testing.assert_allclose(held.T @ held, np.eye(rank), atol=1e-6)
        assert abs(held[-1, 0]) == 1.0  # the largest eigenvalue comes first


def test_the_mean_is_over_blocks_and_the_teacher_takes_no_gradient():
    full, held = features(), axes(features())
    made = full + features(3)
    one = float(mimicking_loss([made], [full], [held]))
    two = float(mimicking_loss([made, full], [full, full], [held, held]))
    assert two == pytest.approx(one / 2, rel=1e-6)
    slope = jax.grad(lambda f: mimicking_loss([made], [f], [held]))(jnp.asarray(full))
    assert not np.asarray(slope).any()


def test_directions_of_a_network_are_those_of_its_features_over_all_batches():
    unit = tapped_program(chain.PROGRAM, image_blocks(chain.PROGRAM)[:-1])
    data = chain.calibration()
    inputs = {"x": data.x, "t": data.t, "y": None}
    held = projections(unit, chain.model().params, inputs, 2, 16)
    assert [e.shape for e in held] == [(chain.WIDTH, chain.WIDTH // 2)] * 3
    forward = jax.jit(functools.partial(chain.model().module.apply, capture_intermediates=True))
    _, state = forward({"params": chain.model().params}, data.x, data.t)
    for name, directions in zip(("mix", "a", "b"), held):
        rows = np.asarray(state["intermediates"][name]["__call__"][0]).reshape(-1, chain.WIDTH)
        expected = leading_directions(rows.T.astype(np.float64) @ rows, 2)
        # A space, whatever the signs of its vectors.
        np.testing.assert_allclose(
            directions @ directions.T, expected @ expected.T, rtol=1e-3, atol=1e-3
        )
