"""Which elements share a scale: the acceptance figures of the ladder, weights alone and with activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.quant.qparams import dynamic_qparams, from_range
from qdiff_jax.quant.quantizer import fake_quant
from qdiff_jax.quant.ranges import min_max
from qdiff_jax.quant.spec import QuantSpec, code_range

from ..tiny_unet import QUICK
from .dit_layer import layer, output_error, relative

TOLERANCE = 0.002  # float32
GROUPS = (288, 192, 128, 96, 64, 32)
LADDER = {  # weights in 4 bits: per tensor, per output channel, per group of input channels
    False: (0.9246, 0.4353, 0.2885, 0.2581, 0.2090, 0.1811, 0.1534, 0.1386),
    True: (0.9473, 0.5747, 0.4082, 0.3875, 0.3190, 0.2767, 0.2427, 0.2270),
}
DYNAMIC = (0.2898, 0.2591, 0.2097, 0.1817, 0.1539, 0.1389)

quantized = jax.jit(fake_quant, compiler_options=QUICK)


def specs(symmetric: bool) -> list[QuantSpec]:
    fields = {"symmetric": symmetric, "signed": symmetric}
    return [
        QuantSpec(**fields),
        QuantSpec(granularity="channel", **fields),
        *(QuantSpec(granularity="group", axis=-2, group=g, **fields) for g in GROUPS),
    ]


def rounded(kernel, spec: QuantSpec) -> np.ndarray:
    """Min-max ranges; symmetric codes are +-7."""
    qmin, qmax = code_range(spec, 4, narrow=spec.symmetric)
    qparams = from_range(spec, *min_max(kernel, spec), qmin, qmax)
    return np.asarray(quantized(qparams, jnp.asarray(kernel, jnp.float32)))


@functools.cache
def moment() -> np.ndarray:
    x = layer().x
    return (x.T @ x).astype(np.float32)


def error_of_weights(kernel) -> float:
    """||X D|| / ||X W|| by the second moment of X, D what rounding changed."""
    wanted = layer().kernel
    d = (np.asarray(kernel) - wanted).astype(np.float32)
    return np.sqrt(np.sum(d * (moment() @ d), dtype=np.float64)) / np.linalg.norm(layer().y)


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_alone_gain_with_every_finer_granularity(symmetric):
    held = layer()
    errors = [error_of_weights(rounded(held.kernel, spec)) for spec in specs(symmetric)]
    np.testing.assert_allclose(errors, LADDER[symmetric], atol=TOLERANCE)
    assert (np.diff(errors) < 0).all()


def test_groups_of_both_sides_with_ranges_measured_on_the_token():
    """Q-DiT: 8-bit activations per (token, group), weights per (group, output), the same groups."""
    held, errors = layer(), []
    x = jnp.asarray(held.x, jnp.float32)
    for group in GROUPS:
        spec = QuantSpec(granularity="group", group=group, dynamic=True)
        seen = quantized(dynamic_qparams(spec, 0, 255), x)
        weight = rounded(held.kernel, QuantSpec(granularity="group", axis=-2, group=group))
        errors.append(output_error(seen, weight, held.y))
    np.testing.assert_allclose(errors, DYNAMIC, atol=TOLERANCE)
    assert (np.diff(errors) < 0).all()


def test_one_group_is_one_channel():
    held = layer()
    whole = QuantSpec(granularity="group", axis=-2, group=len(held.kernel))
    channel = QuantSpec(granularity="channel")
    np.testing.assert_array_equal(rounded(held.kernel, whole), rounded(held.kernel, channel))


def test_a_range_of_one_sign_still_holds_zero():
    """A clamped zero point without zero in the range (Q-DiT's code, round-to-nearest path) loses the group."""
    w = layer().offset
    ours = fake_quant(from_range(QuantSpec(), w.min(), w.max(), 0, 15), jnp.asarray(w, jnp.float32))
    scale = (w.max() - w.min()) / 15
    zero = np.clip(np.round(-w.min() / scale), 0, 15)
    clamped = (np.clip(np.round(w / scale) + zero, 0, 15) - zero) * scale
    assert relative(ours, w) == pytest.approx(0.019, abs=0.0005)
    assert relative(clamped, w) == pytest.approx(0.908, abs=0.0005)
