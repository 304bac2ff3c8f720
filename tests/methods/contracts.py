"""What must hold of the outcome of any method: checks on arrays, which compile nothing of a network."""

import jax
import numpy as np

from qdiff_jax.branch import low_rank
from qdiff_jax.export.integer import check_executable
from qdiff_jax.export.qtensor import QTensor, codes
from qdiff_jax.methods.efficientdm import left_alone
from qdiff_jax.models.program import temporal_nodes
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.timed import TimeIndexed, select, step_context
from qdiff_jax.sites import SiteQuant, flatten_sites, nest_sites, side_of
from qdiff_jax.stages.stage import QuantState, decide_codes, fold_weights, kernel_at

from .. import tiny_unet
from ..stages.chain import leaves_equal
from .cases import CASES, CONFIG, NETWORKS, TIMESTEPS, calibration, model, network_of, parameters


def leaves_by_path(params) -> dict[str, np.ndarray]:
    """{"block/.../leaf": array}."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in paths}


def codes_are_in_range(state: QuantState) -> None:
    """Every planned weight holds codes of its bits, on the grid of its plan."""
    flat = flatten_sites(state.quant)
    params = model(network_of(state.plan)).params
    for entry in state.plan.quantized("weight"):
        tensor = jax.device_get(flat[entry.site].rhs)
        assert isinstance(tensor, QTensor), entry.site
        assert tensor.bits == entry.bits
        assert tensor.qparams.spec == entry.spec
        assert tensor.shape == kernel_at(params, entry.site).shape
        held = codes(tensor)
        assert (held.min() >= entry.codes[0]) & (held.max() <= entry.codes[1])
        assert np.isfinite(tensor.qparams.scale).all()
        assert (tensor.qparams.scale > 0).all()


def by_step(name: str, site: str, operand: str, alone=()) -> bool:
    """Whether the method of a case has a table for this activation. alone: EfficientDM's exceptions."""
    entry = CASES[name].entry
    if entry == "efficientdm":
        return site not in alone
    if name == "tfmq faithful" or entry == "tdq":
        return True
    if name == "tfmq":
        return site.split("/")[0] in temporal_nodes(model().program)
    return entry == "tcaq" and operand == "softmax"


def activations_have_quantizers(name: str, state: QuantState) -> None:
    """Every planned activation has a quantizer of its bits, and a step table where the method makes one."""
    flat = flatten_sites(state.quant)
    alone = left_alone(model(network_of(state.plan)), state.plan)
    for entry in state.plan.quantized("input", "q", "k", "softmax", "v"):
        site = flat[entry.site]
        made = getattr(site, side_of(entry.operand))
        table = by_step(name, entry.site, entry.operand, alone)
        assert isinstance(made, TimeIndexed if table else QParams), entry
        rows = made.table if table else made
        if CASES[name].entry == "tcaq" and entry.operand == "softmax":
            # Of the union where steps disagree, of their own grid where all agree.
            assert rows.spec.grid in ("affine", "log2", "affine_or_log2")
        else:
            assert rows.spec == entry.spec
        parts = (2,) if entry.spec.granularity == "split" else ()
        assert rows.scale.shape == ((len(TIMESTEPS),) if table else parts)
        # TDQ gives an activation of both signs codes symmetric about zero, one fewer than there are.
        fewer = np.asarray(rows.qmax) < entry.codes[1]
        assert CASES[name].entry == "tdq" or not fewer.any()
        assert (np.asarray(rows.qmax) == entry.codes[1] - fewer).all()
        assert (np.asarray(rows.qmin) == entry.codes[0]).all()
        assert (np.asarray(rows.scale) > 0).all()


def nothing_else_is_left(state: QuantState) -> None:
    """Sites are those of the plan, what it keeps holds no quantizer, no tap stays behind, and no operator but
    a low-rank branch beside a planned weight."""
    flat = flatten_sites(state.quant)
    weights = {entry.site for entry in state.plan.quantized("weight")}
    assert set(flat) == {entry.site for entry in state.plan.quantized()}
    for entry in state.plan.entries:
        if entry.bits is None and entry.site in flat:
            side = "lhs" if entry.operand in ("input", "q", "softmax") else "rhs"
            assert getattr(flat[entry.site], side) is None, entry
    for site, held in flat.items():
        assert held.tap is None, site
        branch = held.substitute is not None
        assert not branch or (held.substitute.apply is low_rank and site in weights), site
        assert not held.execute
        assert held.product == site.endswith(("/qk", "/pv", "/attn_qk", "/attn_pv"))


def untouched_leaves_are_untouched(name: str, state: QuantState) -> None:
    """Folded parameters differ from the checkpoint's in planned kernels, refitted biases and what the
    method says it has tuned; every other leaf, norms and biases included, is the same to the last bit."""
    network = network_of(state.plan)
    before = leaves_by_path(model(network).params)
    after = leaves_by_path(fold_weights(parameters(state), state.quant)[0])
    biases = {f"{n}/bias" for n, s in flatten_sites(state.quant).items() if s.bias is not None}
    tuned = set(state.aux.get("params", {}))
    # Solving refits them, and an input that was shifted takes one that makes up for it.
    shifted = {f"{n}/bias" for n, s in flatten_sites(state.quant).items() if _is_shifted(s)}
    solved = "closed_form" in (CASES[name].entry, CASES[name].options.get("rounding"))
    assert bool(biases) if solved else biases == shifted
    # Channel factors: kernels, the divisors of their inputs, affines of the norms of attention. Balancing:
    # kernels, and what takes the divisions. Tuning after closed-form rounding: affines of every norm. Training
    # of the whole network: everything but planned kernels.
    tuning = ("tcaq whole", "closed_form", "ptq4dit", "binarydm", "tdq qat")
    assert not tuned or name in tuning
    added = {path for path in tuned if path.endswith("/divisor")}
    assert set(after) == set(before) | added
    kernels = {f"{entry.site}/kernel" for entry in state.plan.quantized("weight")}
    changed = {
        path
        for path, leaf in before.items()
        if leaf.dtype != after[path].dtype or not np.array_equal(leaf, after[path])
    }
    assert changed <= kernels | biases | tuned
    assert kernels <= changed
    assert NETWORKS[network].plain <= set(before)


def _is_shifted(site: SiteQuant) -> bool:
    return site.substitute is not None and site.substitute.arrays.shift is not None


def folding_writes_what_the_codes_say(state: QuantState) -> None:
    """Kernels become (code - zero point) * scale; once folded, nothing is left to fold."""
    whole = parameters(state)
    assert leaves_equal(decide_codes(state.quant, whole), state.quant)
    params, quant = fold_weights(whole, state.quant)
    assert jax.tree.structure(params) == jax.tree.structure(whole)
    weights = {e.site: e for e in state.plan.quantized("weight")}
    for site, entry in weights.items():
        tensor = jax.device_get(flatten_sites(state.quant)[site].rhs)
        np.testing.assert_array_equal(kernel_at(params, site), values_of(tensor, entry.spec), site)
    assert not [n for n, s in flatten_sites(quant).items() if s.rhs is not None and not s.product]
    again = fold_weights(params, quant)
    assert leaves_equal(again[0], params)
    assert leaves_equal(again[1], quant)


def values_of(tensor: QTensor, spec) -> np.ndarray:
    """What the codes of a weight stand for, in NumPy; of a split weight part by part."""
    held, grid = codes(tensor).astype(np.float32), tensor.qparams
    if spec.grid == "binary":
        return (2 * held - 1) * np.asarray(grid.scale)
    scale, zero = np.asarray(grid.scale), np.asarray(grid.zero_point)
    if spec.granularity == "group":
        return (held - np.repeat(zero, spec.group, axis=0)) * np.repeat(scale, spec.group, axis=0)
    if spec.granularity != "split":
        return (held - zero) * scale
    axis = held.ndim + spec.axis if spec.axis < 0 else spec.axis
    parts = np.split(held, [spec.boundary], axis=axis)
    return np.concatenate([(p - z) * s for p, z, s in zip(parts, zero, scale)], axis=axis)


def simulated_and_executed(state: QuantState) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of the tiny U-Net at one step: quantizers simulated, and codes multiplied as integers.

    A site that keeps an operand in full precision has no codes there and stays simulated."""
    sites = {
        site: held.replace(execute=held.lhs is not None and held.rhs is not None)
        for site, held in flatten_sites(state.quant).items()
    }
    executed = nest_sites(sites)
    check_executable(executed)
    x, y, t = calibration().x[:2], calibration().y[:2], np.full(2, TIMESTEPS[1])
    ctx, forward = step_context(TIMESTEPS[1], 1), tiny_unet.forward(CONFIG)
    given = ({"params": model().params, "quant": select(q, ctx)} for q in (state.quant, executed))
    return tuple(np.asarray(forward(variables, x, t, y)) for variables in given)
