"""A convolution and its frozen batch normalization, the building block of the image networks."""

import jax
from flax import linen as nn
from jax import lax


class ConvBN(nn.Module):
    """x [B, H, W, C] -> (the convolution alone, the same normalized), both [B, H', W', features].

    No bias; parameters `kernel` [kh, kw, C / groups, features] and `scale`, `bias`, `mean`, `var`
    [features]. Inference only: the statistics are parameters. Full float32 products on every backend,
    since published scores were computed so.
    """

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"
    groups: int = 1
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (*self.kernel, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        raw = lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
            precision=lax.Precision.HIGHEST,
        )
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale, bias, mean, var = (
            self.param(name, init, (self.features,))
            for name, init in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        )
        factor = scale * lax.rsqrt(var + self.epsilon)
        shift = bias - mean * factor
        return raw, raw * factor[None, None, None] + shift[None, None, None]
