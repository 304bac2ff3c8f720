"""The loss of a unit and one step of its training, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qdiff_jax.models.program import subtrees
from qdiff_jax.quant.qparams import from_range
from qdiff_jax.quant.rounding import SoftRounding
from qdiff_jax.quant.spec import QuantSpec
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites
from qdiff_jax.stages.objective import (
    StepInputs,
    initial_optimizer,
    lp_loss,
    make_step,
    mix_inputs,
    sum_of_outputs,
)
from qdiff_jax.stages.unit_trees import (
    folded_trees,
    only_weights,
    soft_trees,
    trainable_alphas,
    trainable_scales,
    without_kernels,
)

from . import chain

UNIT = chain.UNITS[1]  # "mix": reads the image and the temporal feature


@pytest.mark.parametrize("p", [2.0, 2.4, 1.0])
@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3), (5, 2, 4, 3)])
def test_loss_sums_channels_and_averages_the_rest(p, shape):
    rng = np.random.default_rng(0)
    y, target = rng.standard_normal((2, *shape)).astype(np.float32)
    wanted = (np.abs(y - target) ** p).sum(-1).mean()
    np.testing.assert_allclose(lp_loss(y, target, p), wanted, rtol=2e-5)


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_gradient_of_the_loss_vanishes_where_the_error_does(p):
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
    target = y.at[0].add(-1.0).at[1].add(0.5)
    gradient = np.asarray(jax.grad(lp_loss)(y, target, p))
    wanted = np.zeros((4, 3))
    wanted[0], wanted[1] = p / 4, -p * 0.5 ** (p - 1) / 4
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_outputs_are_added_and_must_pair_up():
    a, b = jnp.ones((2, 3)), jnp.full((2, 5), 2.0)
    zeros = (jnp.zeros((2, 3)), jnp.zeros((2, 5)))
    assert float(sum_of_outputs((a, b), zeros, 2.0)) == 3.0 + 20.0
    with pytest.raises(ValueError, match="zip"):
        sum_of_outputs((a, b), zeros[:1], 2.0)


class TestMixing:
    def test_share_of_quantized_elements(self):
        ones, zeros = (jnp.ones((64, 50)),), (jnp.zeros((64, 50)),)
        (mixed,) = mix_inputs(jax.random.key(0), 0.3, ones, zeros)
        assert set(np.unique(mixed)) == {0.0, 1.0}
        assert abs(float(mixed.mean()) - 0.3) < 0.03

    def test_labels_and_absent_inputs_pass_and_inputs_differ(self):
        y = jnp.arange(4)
        a, b = jnp.ones((4, 100)), jnp.zeros((4, 100))
        first, labels, none, second = mix_inputs(
            jax.random.key(0), 0.5, (a, y, None, a), (b, y, None, b)
        )
        assert labels is y
        assert none is None
        assert (np.asarray(first) != np.asarray(second)).any()


class TestTrees:
    def test_soft_trees_leave_decided_weights(self):
        state = chain.state()
        soft = soft_trees(chain.model().params, state.quant, UNIT)
        assert isinstance(soft[0]["conv"].rhs, SoftRounding)
        assert list(trainable_alphas(soft)) == ["0:conv"]
        params = subtrees(chain.model().params, UNIT)
        stripped = without_kernels(params[0], soft[0])
        assert set(stripped["conv"]) == {"bias"}

    def test_scales_of_products_have_two_sides(self):
        flat = flatten_sites(chain.state().quant)
        grid = from_range(QuantSpec(), -1.0, 1.0, 0, 255)
        flat["a/conv"] = flat["a/conv"].replace(lhs=grid)
        flat["a/qk"] = SiteQuant(lhs=grid, rhs=grid, product=True)
        trees = folded_trees(nest_sites(flat), chain.UNITS[2])
        assert sorted(trainable_scales(trees)) == ["0:conv:lhs", "0:qk:lhs", "0:qk:rhs"]
        assert only_weights(trees) == ({},)


@pytest.fixture(scope="module")
def carry():
    calibrated = chain.calibration(per_step=4)
    soft = only_weights(soft_trees(chain.model().params, chain.state().quant, UNIT))
    params = tuple(
        without_kernels(p, q) for p, q in zip(subtrees(chain.model().params, UNIT), soft)
    )
    rng = np.random.default_rng(0)
    temb = rng.standard_normal((16, chain.WIDTH)).astype(np.float32)
    trainable = {"alpha": trainable_alphas(soft)}
    return {
        "frozen": (params, soft),
        "data": {
            "inputs": (calibrated.x, temb),
            "targets": (rng.standard_normal((16, 4, 4, chain.WIDTH)).astype(np.float32),),
            "ctx": chain.context(calibrated),
        },
        "trainable": trainable,
        "optimizer": initial_optimizer(trainable),
    }


class TestStep:
    @staticmethod
    def inputs(**changes):
        values = StepInputs(
            rows=np.arange(4, dtype=np.int32),
            lr=np.float32(0.1),
            scale_lr=np.float32(0.0),
            beta=np.float32(4.0),
            rounding_weight=np.float32(0.5),
            key_data=np.zeros(2, np.uint32),
        )
        return values._replace(**changes)

    def loss(self, carry, alpha, inputs):
        """By hand: reconstruction of the rows asked for, and the whole objective."""
        rounding = flatten_sites(carry["frozen"][1][0])["conv"].rhs
        h = jnp.clip(1.2 * jax.nn.sigmoid(alpha) - 0.1, 0.0, 1.0)
        grid = rounding.qparams
        code = jnp.clip(rounding.base + h, 0.0, 15.0)
        kernel = (code - grid.zero_point.reshape(1, 1, 1, -1)) * grid.scale.reshape(1, 1, 1, -1)
        x, temb = (leaf[inputs.rows] for leaf in carry["data"]["inputs"])
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        bias = carry["frozen"][0][0]["conv"]["bias"]
        y = y + bias.reshape(1, 1, 1, -1) + temb[:, None, None, :]
        target = carry["data"]["targets"][0][inputs.rows]
        rec = jnp.mean(jnp.sum((y - target) ** 2, axis=-1))
        penalty = jnp.sum(1.0 - jnp.abs(2.0 * h - 1.0) ** inputs.beta)
        return rec + inputs.rounding_weight * penalty, rec

    def test_is_adam_on_the_objective(self, carry):
        inputs = self.inputs()
        step = jax.jit(make_step(UNIT.signature))
        after, values = step(carry, inputs)
        alpha = carry["trainable"]["alpha"]["0:conv"]
        wanted, gradient = jax.value_and_grad(lambda a: self.loss(carry, a, inputs), has_aux=True)(
            alpha
        )
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
        with jax.numpy_dtype_promotion("standard"):
            moved, _ = optax.adam(0.1).update(gradient, optax.adam(0.1).init(alpha))
        new = after["trainable"]["alpha"]["0:conv"]
        # Adam's first step is the sign of the gradient: compare where that is beyond rounding.
        clear = np.abs(gradient) > 1e-4
        assert clear.mean() > 0.5
        np.testing.assert_allclose(
            np.asarray(new)[clear], np.asarray(alpha + moved)[clear], atol=1e-4
        )

    def test_nothing_else_moves(self, carry):
        after, _ = jax.jit(make_step(UNIT.signature))(carry, self.inputs())
        assert chain.leaves_equal(after["frozen"], carry["frozen"])
        assert chain.leaves_equal(after["data"], carry["data"])

    def test_equal_arguments_give_the_same_step(self):
        a, b = chain.UNITS[2], chain.UNITS[3]
        assert a.name != b.name
        assert make_step(a.signature) is make_step(b.signature)
        assert make_step(a.signature, 2.4) is not make_step(b.signature)
