"""Convolutions and dense layers of the models: parameters at a site, multiplied through `sites.op`."""

from collections.abc import Callable

import jax
from flax import linen as nn

from qdiff_jax.operators import DENSE, Operator, same_conv
from qdiff_jax.quant.hadamard import rotate
from qdiff_jax.sites import op

FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class _Linear(nn.Module):
    """The parameters of one convolution or dense layer, created only when its kernel is asked for.

    `divisor` [in] and `rotation` [blocks, n] are none of the layer's own: a transform of the parameters may
    put them there after moving a factor of each input channel (stages.channel_factors), then a rotation of
    the channels (stages.rotations), into the kernel. Nor is the `bias` of a layer without one, which a stage
    may put there after fitting it to the codes."""

    shape: tuple[int, ...]
    use_kernel: bool = True
    init: Callable = FAN_IN
    use_bias: bool = True

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", self.init, self.shape) if self.use_kernel else None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), self.shape[-1:])
        else:
            bias = self._moved("bias")
        return kernel, bias, self._moved("divisor"), self._moved("rotation")

    def _moved(self, name: str):
        return self.get_variable("params", name) if self.has_variable("params", name) else None


def linear(
    module: nn.Module,
    name: str,
    operator: Operator,
    x: jax.Array,
    shape: tuple[int, ...],
    init: Callable = FAN_IN,
    use_bias: bool = True,
) -> jax.Array:
    """A convolution or dense layer with parameters `name/{kernel,bias}` at the site `name`.

    shape: of the kernel, HWIO or [in, out]. Computes in x.dtype. A site that holds packed codes needs
    no kernel in the parameters.
    """
    site = module.get_variable("quant", name) if module.has_variable("quant", name) else None
    holds_codes = site is not None and hasattr(site.rhs, "qparams")
    own = _Linear(shape, use_kernel=not holds_codes, init=init, use_bias=use_bias, name=name)
    kernel, bias, divisor, rotation = own()
    if divisor is not None:
        x = x / divisor.reshape((1,) * (x.ndim - 1) + divisor.shape).astype(x.dtype)
    if rotation is not None:
        # Training may not move it: it would be no rotation any more.
        x = rotate(x, jax.lax.stop_gradient(rotation))
    return op(
        module,
        name,
        operator,
        x,
        lambda: kernel.astype(x.dtype),
        None if bias is None else bias.astype(x.dtype),
    )


def conv(
    module: nn.Module,
    name: str,
    x: jax.Array,
    features: int,
    size: int = 3,
    operator: Operator | None = None,
    init: Callable = FAN_IN,
) -> jax.Array:
    """A size x size convolution of x [B, H, W, C]; `operator` sets another stride or padding."""
    operator = operator or same_conv(size)
    return linear(module, name, operator, x, (size, size, x.shape[-1], features), init)


def dense(
    module: nn.Module,
    name: str,
    x: jax.Array,
    features: int,
    init: Callable = FAN_IN,
    use_bias: bool = True,
) -> jax.Array:
    """A dense layer on the last axis of x [..., C]."""
    return linear(module, name, DENSE, x, (x.shape[-1], features), init, use_bias)
