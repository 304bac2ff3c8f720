"""Site policies by name: our common one, and the choices of every method's official code.

Who keeps the first convolution in full precision decides published tables, so every method can run under one
common policy, and the official choices stand beside it.
Source: site-policy table of the U-Net PTQ family (official repositories of the methods named).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence

from qdiff_jax.policy import ACTIVATION, ACTIVATIONS, ALWAYS_ZERO, BINARY_WEIGHT, WEIGHT, Rule
from qdiff_jax.sites import Site


def _present(sites: Sequence[Site], rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Drop a preset's rules that take nothing here (no attention, no shortcut, first layer = last)."""
    left = [(site.name, operand) for site in sites for operand in site.operands]
    kept = []
    for rule in rules:
        rest = [pair for pair in left if not rule.takes(*pair)]
        if len(rest) < len(left):
            kept.append(rule)
        left = rest
    return tuple(kept)


def _targets(w_bits: int | None, a_bits: int | None) -> tuple[Rule, ...]:
    activation = ACTIVATION if a_bits else None
    weight = None if not w_bits else BINARY_WEIGHT if w_bits == 1 else WEIGHT
    return (
        Rule("weights at target bits", "*", ("weight",), w_bits, weight),
        Rule("activations at target bits", "*", ACTIVATIONS[:-1], a_bits, activation),
    )


def _softmax(a_bits: int | None, bits: int = 8) -> Rule:
    keep = a_bits is None
    return Rule(
        f"softmax at {bits} bits, always-zero",
        "*",
        ("softmax",),
        None if keep else bits,
        None if keep else ALWAYS_ZERO,
    )


def first_layer(sites: Sequence[Site]) -> Site:
    """The first layer of the field's tables, the input's: the first convolution, where there is one. The time
    embedding runs before it."""
    return next((s for s in sites if s.operator.kind == "conv"), sites[0])


def _ends(sites: Sequence[Site], w_bits: int | None, a_bits: int | None) -> tuple[Rule, ...]:
    """The first and the last layer at 8 bits."""
    first = first_layer(sites)
    rules = []
    for which, site in (("first", first), ("last", last_weight_site(sites))):
        if w_bits:
            rules.append(Rule(f"{which} layer at 8 bits", site.name, ("weight",), 8, WEIGHT))
        if a_bits:
            rules.append(Rule(f"{which} layer at 8 bits", site.name, ("input",), 8, ACTIVATION))
    return tuple(rules)


# The same layers under the names of each family: the U-Nets of DDPM and of latent diffusion, DiT and PixArt.
_SHORTCUTS = ("*/nin_shortcut", "*/skip_connection")

_DOWNSAMPLING = ("*_downsample/*", "input_blocks_*/op")

_UPSAMPLING = ("*_upsample/*", "output_blocks_*/conv")

_FIRST_TIME_LAYER = ("temb/dense_0", "time_embed/dense_0", "t_embedder/mlp_0")

_TIME_EMBEDDING = ("temb/*", "time_embed/*", "t_embedder/*")

_TIME_PROJECTIONS = ("*_temb_proj/*", "*_emb_layers_1/*")

_MODULATION = ("*_adaLN/*", "t_block/*")

_CAPTION_EMBEDDING = ("y_embedder/*",)


def _unquantized(name: str, patterns: Sequence[str]) -> tuple[Rule, ...]:
    name = f"{name} in full precision"
    return tuple(Rule(name, pattern, ("input", "weight"), None, None) for pattern in patterns)


_NO_PRODUCTS = Rule(
    "attention products in full precision", "*", ("q", "k", "v", "softmax"), None, None
)


def common(sites: Sequence[Site], w_bits: int | None, a_bits: int | None) -> tuple[Rule, ...]:
    """Our default: everything quantized, first and last layer at 8 bits, softmax 8 bits always-zero.

    w_bits or a_bits None leaves weights or activations in full precision; w_bits 1 is binary, +-scale.
    """
    ends = _ends(sites, w_bits, a_bits)
    return _present(sites, (*ends, _softmax(a_bits), *_targets(w_bits, a_bits)))


def official_qdiffusion(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """Q-Diffusion's code: every layer at target bits, first and last included; softmax 8 bits."""
    return _present(sites, (_softmax(a_bits), *_targets(w_bits, a_bits)))


def official_tfmq(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """TFMQ-DM's code: conv_in, the first time-embedding layer, the last convolution, shortcuts and
    up/down-sampling in full precision; the next two layers keep their activations; attention products
    are never quantized."""
    fp = ("input", "weight")
    convs = [s.name for s in sites if s.operator.kind == "conv"]
    if len(convs) < 3:
        raise ValueError(
            f"Policy 'official:tfmq' speaks of the first three convolutions and the model has "
            f"{len(convs)}; use 'common', or rules of your own."
        )
    second, third = convs[1:3]
    rules = (
        Rule("conv_in in full precision", convs[0], fp, None, None),
        *_unquantized("first time layer", _FIRST_TIME_LAYER),
        Rule("last convolution in full precision", convs[-1], fp, None, None),
        *_unquantized("shortcuts", _SHORTCUTS),
        *_unquantized("downsampling", _DOWNSAMPLING),
        *_unquantized("upsampling", _UPSAMPLING),
        Rule("second layer's activation in full precision", second, ("input",), None, None),
        Rule("third layer's activation in full precision", third, ("input",), None, None),
        _NO_PRODUCTS,
        *_targets(w_bits, a_bits),
    )
    return _present(sites, rules)


def official_ptqd(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """PTQD's code: its first two modules (first time layer, conv_in) and the last layer at 8 bits, shortcuts
    and downsampling in full precision, softmax 8 bits, all else at target bits."""
    first = first_layer(sites)
    rules = [
        *_unquantized("shortcuts", _SHORTCUTS),
        *_unquantized("downsampling", _DOWNSAMPLING),
    ]
    names = (*_FIRST_TIME_LAYER, first.name, last_weight_site(sites).name)
    for name in dict.fromkeys(names):
        if w_bits:
            rules.append(Rule("first two and last at 8 bits", name, ("weight",), 8, WEIGHT))
        if a_bits:
            rules.append(Rule("first two and last at 8 bits", name, ("input",), 8, ACTIVATION))
    return _present(sites, (*rules, _softmax(a_bits), *_targets(w_bits, a_bits)))


def official_ptq4dm(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """PTQ4DM's code: first and last layer at 8 bits, every other layer at target bits, attention products in
    full precision."""
    ends = _ends(sites, w_bits, a_bits)
    return _present(sites, (*ends, _NO_PRODUCTS, *_targets(w_bits, a_bits)))


def official_tdq(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """TDQ's re-hosted code: convolutions and dense layers, those of attention included, at target bits, first
    and last at 8, the time embedding and attention products in full precision."""
    embedding = _unquantized("time embedding", _TIME_EMBEDDING)
    ends = _ends(sites, w_bits, a_bits)
    return _present(sites, (*embedding, *ends, _NO_PRODUCTS, *_targets(w_bits, a_bits)))


def official_tcaq(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """TCAQ-DM's tables: everything at target bits, softmax too, whose grid the method itself chooses."""
    softmax = (_softmax(a_bits, a_bits),) if a_bits else (_softmax(None),)
    return _present(sites, (*softmax, *_targets(w_bits, a_bits)))


def official_ptq4dit(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """PTQ4DiT's code: every layer at target bits, embedders, modulation and the last one included; q, k, v and
    the softmax output at 8 bits."""
    products = (Rule("q, k and v at 8 bits", "*", ("q", "k", "v"), 8, ACTIVATION),)
    return _present(
        sites, (_softmax(a_bits), *(products if a_bits else ()), *_targets(w_bits, a_bits))
    )


def official_svdquant(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """SVDQuant's code: layers of the blocks at target bits, the modulation (in a U-Net: the time projections)
    with its weights alone, embedders, first and last layer and attention products in full precision."""
    fp = ("input", "weight")
    first = first_layer(sites)
    rules = (
        *_unquantized("embedders", (*_TIME_EMBEDDING, *_CAPTION_EMBEDDING)),
        Rule("first layer in full precision", first.name, fp, None, None),
        Rule("last layer in full precision", last_weight_site(sites).name, fp, None, None),
        Rule("last modulation in full precision", "final_layer_adaLN/*", fp, None, None),
        *(
            Rule("modulation: weights alone", pattern, ("input",), None, None)
            for pattern in (*_MODULATION, *_TIME_PROJECTIONS)
        ),
        _NO_PRODUCTS,
        *_targets(w_bits, a_bits),
    )
    return _present(sites, rules)


def official_binarydm(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """BinaryDM's code: the time embedding's own layers, the first and the last convolution in full precision
    (8 bits in the paper: `common`), all else at target bits, attention products and softmax included."""
    fp = ("input", "weight")
    first = first_layer(sites)
    softmax = (_softmax(a_bits, a_bits),) if a_bits else (_softmax(None),)
    rules = (
        *_unquantized("time embedding", _TIME_EMBEDDING),
        Rule("first layer in full precision", first.name, fp, None, None),
        Rule("last layer in full precision", last_weight_site(sites).name, fp, None, None),
        *softmax,
        *_targets(w_bits, a_bits),
    )
    return _present(sites, rules)


def embedding_and_ends(sites: Sequence[Site]) -> tuple[str, ...]:
    """Names of the layers of the time embedding, of the first layer and of the last."""
    first = first_layer(sites)
    time = [s.name for s in sites if any(fnmatch.fnmatchcase(s.name, p) for p in _TIME_EMBEDDING)]
    return tuple(dict.fromkeys((*time, first.name, last_weight_site(sites).name)))


def official_efficientdm(sites, w_bits, a_bits) -> tuple[Rule, ...]:
    """EfficientDM's code (MPQ-DM's too): the time embedding, first and last layer at 8 bits, shortcuts,
    downsampling and attention products in full precision, all else at target bits."""
    rules = [
        *_unquantized("shortcuts", _SHORTCUTS),
        *_unquantized("downsampling", _DOWNSAMPLING),
    ]
    for name in embedding_and_ends(sites):
        if w_bits:
            rules.append(Rule("embedding and ends at 8 bits", name, ("weight",), 8, WEIGHT))
        if a_bits:
            rules.append(Rule("embedding and ends at 8 bits", name, ("input",), 8, ACTIVATION))
    return _present(sites, (*rules, _NO_PRODUCTS, *_targets(w_bits, a_bits)))


POLICIES: dict[str, Callable[..., tuple[Rule, ...]]] = {
    "common": common,
    "official:qdiffusion": official_qdiffusion,
    "official:brecq": official_qdiffusion,
    "official:tfmq": official_tfmq,
    "official:ptqd": official_ptqd,
    "official:ptq4dm": official_ptq4dm,
    "official:tdq": official_tdq,
    "official:tcaq": official_tcaq,
    "official:ptq4dit": official_ptq4dit,
    "official:svdquant": official_svdquant,
    "official:efficientdm": official_efficientdm,
    "official:binarydm": official_binarydm,
}


def policy(
    name: str, sites: Sequence[Site], w_bits: int | None, a_bits: int | None
) -> tuple[Rule, ...]:
    """The rules of a named policy. Raises ValueError for an unknown name, listing those there are.

    "official:brecq" is Q-Diffusion's table, whose code is where BRECQ meets diffusion models.
    """
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Policy {name!r} is unknown; there are {sorted(POLICIES)}.{hint}")
    return POLICIES[name](sites, w_bits, a_bits)


def last_weight_site(sites: Sequence[Site]) -> Site:
    """The last site with a weight in order of execution: the layer that writes the prediction."""
    return [s for s in sites if s.has_weight][-1]
