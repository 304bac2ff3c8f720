"""The diffusion transformer with adaLN-zero blocks, in the meaning of the official DiT checkpoints.

Source: Peebles and Xie 2023, section 3.2, and the released weights: patches embedded by a strided
convolution, a fixed 2-D sinusoidal position table, blocks modulated by c = t_emb + y_emb,

    beta_1, gamma_1, alpha_1, beta_2, gamma_2, alpha_2 = split(silu(c) A + a, 6)
    x <- x + alpha_1 proj(attention(qkv(LN(x) (1 + gamma_1) + beta_1)))
    x <- x + alpha_2 fc2(gelu(fc1(LN(x) (1 + gamma_2) + beta_2)))

with LayerNorm without affine parameters (eps 1e-6) and the tanh form of GELU. Every operator goes
through `sites.op`; the forward pass is the block program. Parameter names follow the checkpoint:
`blocks.0.attn.qkv` is `blocks_0/attn_qkv`; the adaLN projection of a block, which depends on the
timestep and the label alone, is a block of its own (`blocks_0_adaLN/dense`), so that temporal
features can be treated as one unit, and `t_embedder` holds the label embedding too. The position
table is computed, not a parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdiff_jax.models.layers import conv, dense
from qdiff_jax.models.program import Node, run_program, validate
from qdiff_jax.operators import PV, QK, Operator
from qdiff_jax.sites import op

_LN_EPS = 1e-6
SEMANTICS = ("official", "diffusers")
_FREQUENCIES = 256  # width of the timestep sinusoid, whatever the model's

# Initial values as published: what closes a residual branch starts at zero, so that each block
# starts as the identity.
_XAVIER = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(0.02)
_ZERO = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network. The published ImageNet models are `DiTConfig.xl_2(32)` and, for 512 x 512
    images, `DiTConfig.xl_2(64)`.

    resolution: side of the (latent) image. mlp_ratio: width of the MLP by that of the tokens.
    num_classes: None for an unconditional model; otherwise classes 0..num_classes-1 and the null
    class num_classes. learn_sigma: the output has 2 * in_channels channels, noise estimate first and
    the variance's interpolation weight behind. dtype: "float32" or "bfloat16", the compute type;
    parameters are float32. semantics: "official" is the network of the released weights and of every
    published figure. "diffusers" computes what diffusers' DiTTransformer2DModel does with the same
    weights: another network, whose timestep frequencies end at 1/10000 (k / (dim/2 - 1)) and whose
    LayerNorm before the MLP has eps 1e-5; only for comparison with that class.
    Raises ValueError for sizes that do not divide, an unknown dtype or unknown semantics.
    """

    width: int = 1152
    depth: int = 28
    heads: int = 16
    patch: int = 2
    mlp_ratio: float = 4.0
    resolution: int = 32
    in_channels: int = 4
    num_classes: int | None = 1000
    learn_sigma: bool = True
    dtype: str = "float32"
    semantics: str = "official"

    @staticmethod
    def xl_2(resolution: int = 32) -> DiTConfig:
        return DiTConfig(resolution=resolution)

    @property
    def null_class(self) -> int | None:
        """The label of the unconditional branch, None for an unconditional model."""
        return self.num_classes

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def __post_init__(self):
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width={self.width} must be divisible by heads={self.heads} and by 4 (the position "
                "table has a sine and a cosine for each of two axes)."
            )
        if self.resolution % self.patch:
            raise ValueError(
                f"resolution={self.resolution} must be divisible by patch={self.patch}."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not one of 'float32', 'bfloat16'.")
        if self.semantics not in SEMANTICS:
            raise ValueError(f"semantics {self.semantics!r} is not one of {SEMANTICS}.")


def timestep_embedding(t: jax.Array, dim: int, shift: int = 0) -> jax.Array:
    """Sinusoidal embedding [B, dim] of (fractional) timesteps t [B], as in the DiT checkpoints.

    f_k = exp(-ln(10000) k / (dim/2 - shift)), order [cos, sin].
    """
    half = dim // 2
    freqs = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000.0) / (half - shift)))
    args = t.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=1)


def position_table(width: int, side: int) -> np.ndarray:
    """The fixed position embedding [side * side, width] float32, tokens in row-major order."""
    return sincos_positions(width, np.arange(side), np.arange(side))


def sincos_positions(width: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Position embedding [R * C, width] float32 of the places rows [R] x columns [C], row-major.

    The first half encodes the column, the second the row, each [sin, cos] with
    omega_k = 10000^(-k / (width/4)); computed in float64.
    """
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    places = np.tile(columns, len(rows)), np.repeat(rows, len(columns))
    parts = [f(np.outer(place, omega)) for place in places for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def layer_norm(x: jax.Array, eps: float = _LN_EPS) -> jax.Array:
    """LayerNorm over the last axis without affine parameters, in float32 whatever x is."""
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(h), axis=-1, keepdims=True)
    return (h * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float = _LN_EPS) -> jax.Array:
    """LN(x) (1 + scale) + shift for tokens x [B, N, D] and shift, scale [B, D]."""
    return layer_norm(x, eps) * (1.0 + scale[:, None, :]) + shift[:, None, :]


class PatchEmbed(nn.Module):
    """Image [B, H, W, C] to tokens [B, N, D]: a convolution of stride `patch`, plus positions."""

    width: int
    patch: int
    dtype: str

    @nn.compact
    def __call__(self, x, train=False):
        stride = Operator("conv", (self.patch, self.patch))
        x = conv(
            self, "proj", x.astype(self.dtype), self.width, self.patch, stride, init=_patch_xavier
        )
        batch, side, _, width = x.shape
        positions = jnp.asarray(position_table(width, side)).astype(x.dtype)
        return x.reshape(batch, side * side, width) + positions[None]


def _patch_xavier(key, shape, dtype=jnp.float32):
    """Xavier for the convolution seen as a dense layer on flattened patches, as published."""
    return _XAVIER(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


class ConditionEmbedder(nn.Module):
    """c = t_emb + y_emb: sinusoid -> mlp_0 -> SiLU -> mlp_2, plus the embedding of the label."""

    width: int
    num_classes: int | None
    dtype: str
    freq_shift: int = 0

    @nn.compact
    def __call__(self, t, y=None, train=False):
        c = timestep_embedding(t, _FREQUENCIES, self.freq_shift).astype(self.dtype)
        c = dense(self, "mlp_0", c, self.width, init=_NORMAL)
        c = dense(self, "mlp_2", nn.silu(c), self.width, init=_NORMAL)
        if self.num_classes is not None:
            rows = self.num_classes + 1
            table = nn.Embed(rows, self.width, embedding_init=_NORMAL, name="y_embedder")
            c = c + table(y).astype(self.dtype)
        return c


class AdaLN(nn.Module):
    """SiLU -> dense: the shifts, scales and gates [B, chunks * D] of one block."""

    features: int

    @nn.compact
    def __call__(self, c, train=False):
        return dense(self, "dense", nn.silu(c), self.features, init=_ZERO)


class DiTBlock(nn.Module):
    """Attention and MLP, each between its modulation and its gate. Tokens [B, N, D] and [B, 6 D]."""

    heads: int
    hidden: int
    mlp_eps: float = _LN_EPS

    @nn.compact
    def __call__(self, x, modulation, train=False):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        batch, tokens, width = x.shape
        qkv = dense(self, "attn_qkv", modulate(x, shift_a, scale_a), 3 * width, init=_XAVIER)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # [B, heads, N, d]
        logits = op(self, "attn_qk", QK, q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        weights = nn.softmax(logits, axis=-1).astype(x.dtype)
        h = op(self, "attn_pv", PV, weights, v).swapaxes(1, 2).reshape(x.shape)
        x = x + gate_a[:, None, :] * dense(self, "attn_proj", h, width, init=_XAVIER)
        h = modulate(x, shift_m, scale_m, self.mlp_eps)
        h = dense(self, "mlp_fc1", h, self.hidden, init=_XAVIER)
        h = dense(self, "mlp_fc2", nn.gelu(h, approximate=True), width, init=_XAVIER)
        return x + gate_m[:, None, :] * h


def unpatchify(tokens: jax.Array, rows: int, columns: int, patch: int) -> jax.Array:
    """Tokens [B, rows * columns, patch * patch * C] as an image [B, H, W, C] float32, channel fastest."""
    h = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1).swapaxes(2, 3)
    return h.reshape(h.shape[0], rows * patch, columns * patch, -1).astype(jnp.float32)


class FinalLayer(nn.Module):
    """Modulated LayerNorm, a dense layer, and patches put back: [B, H, W, out_channels] float32."""

    patch: int
    out_channels: int

    @nn.compact
    def __call__(self, x, modulation, train=False):
        shift, scale = jnp.split(modulation, 2, axis=-1)
        p, channels = self.patch, self.out_channels
        h = dense(self, "linear", modulate(x, shift, scale), p * p * channels, init=_ZERO)
        side = math.isqrt(x.shape[1])
        return unpatchify(h, side, side, p)


@functools.cache
def dit_program(config: DiTConfig) -> tuple[Node, ...]:
    """The block program: inputs "x" [B, H, W, C], "t" [B] and, conditional, "y" [B]."""
    c = config
    conditions = ("t",) if c.num_classes is None else ("t", "y")
    shift, mlp_eps = (0, _LN_EPS) if c.semantics == "official" else (1, 1e-5)
    embedder = ConditionEmbedder(c.width, c.num_classes, c.dtype, shift, parent=None)
    temporal = [Node("t_embedder", embedder, conditions)]
    body = [Node("x_embedder", PatchEmbed(c.width, c.patch, c.dtype, parent=None), ("x",))]

    def modulated(name, module, chunks):
        projection = AdaLN(chunks * c.width, parent=None)
        temporal.append(Node(f"{name}_adaLN", projection, ("t_embedder",)))
        body.append(Node(name, module, (body[-1].name, f"{name}_adaLN")))

    for i in range(c.depth):
        hidden = int(c.width * c.mlp_ratio)
        modulated(f"blocks_{i}", DiTBlock(c.heads, hidden, mlp_eps, parent=None), 6)
    modulated("final_layer", FinalLayer(c.patch, c.out_channels, parent=None), 2)
    program = (*temporal, *body)
    validate(program, ("x", "t", "y"))
    return program


class DiT(nn.Module):
    """Noise estimate [B, H, W, out_channels] float32 from x [B, H, W, C], t [B], y [B] or None.

    With `learn_sigma` the channels are [eps, v]; `v` is what "learned_range" of the DDPM sampler reads.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x, t, y=None, train=False):
        c = self.config
        if c.num_classes is not None and y is None:
            raise ValueError(
                f"This DiT is conditional on {c.num_classes} classes: pass y [B] int32, "
                f"with {c.num_classes} for the null class."
            )
        env = {"x": x, "t": t, "y": y}
        return run_program(self, dit_program(c), env, train=train)
