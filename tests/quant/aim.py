"""The unrounded weights that a layer is rounded from, by the functions that rounding calls."""

from qdiff_jax.quant.moments import cross_moment, toward_target
from qdiff_jax.stages.layer_rounding import _factors


def aimed(kernel, moments, *, ridge=0.0, centred=True):
    """W + (H + ridge * mean(diag H) * I)^-1 C, of the kernel's shape."""
    options = dict(act_order=True, asymmetric=True, centred=centred, double=False)
    given = (moments.spread, moments.mean, moments.weight, 0.01, ridge)
    ridged = _factors(*given, **options)[2]
    return toward_target(kernel, ridged, cross_moment(moments, centred))
