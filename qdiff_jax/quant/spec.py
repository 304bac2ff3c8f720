"""The static half of a quantizer: which grid, which codes, which elements share a scale."""

import dataclasses

# Formats of 4 bits: exponent bits and the largest value, see quant.floating.
FLOATS = {"e1m2": (1, 3.5), "e2m1": (2, 6.0), "e3m0": (3, 16.0)}
GRIDS = ("affine", "log2", "log_sqrt2", "shifted", "affine_or_log2", *FLOATS, "fp4", "binary")
GRANULARITIES = ("tensor", "channel", "token", "group", "split", "cell")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """What kind of quantizer this is. Hashable, never an array: it lives in the treedef.

    Numbers that change from layer to layer or from step to step (scale, zero point, bits) are data
    in `QParams`; a new value of those reuses a compiled function, a new `QuantSpec` compiles again.

    Fields:
      grid: "affine" (uniform integers), "log2" (s * 2**-q, for non-negative x) or "log_sqrt2"
        (s * 2**(-q/2)); "shifted" (uniform, the zero point any real number, see quant.shifted) and
        "affine_or_log2" (the leaf zero_point says which of the two, see quant.either), "binary"
        (+-scale in one bit, for weights, see quant.binary), whose numbers do not follow from a range
        alone; "e1m2", "e2m1", "e3m0" (floating point of 4 bits, signed and symmetric) and "fp4" (the leaf
        zero_point says which of the three, see quant.floating).
      symmetric: the zero point is fixed at 0. Unsigned and symmetric is the "always zero" quantizer
        of a softmax output or a ReLU.
      signed: the integer codes are signed.
      granularity: which elements share a scale.
        "tensor": all. "channel": those with equal index along `axis`. "token": those that differ
        only in the last axis (always dynamic). "group": `group` neighbours along `axis`; a static
        scale is shared over every other axis but the last (weights: [K/g, N]; activations cut along
        the last axis: [K/g]), a dynamic one over none. "split": two parts of the contraction axis,
        before and from `boundary` on, such as a feature map and the skip concatenated behind it; one
        scale for each part of an activation ([2], axis -1), one for each part and output channel of
        a weight ([2, N], axis -2). "cell": the leaves of `QParams` already
        broadcast against x; this is what `freeze` turns a dynamic quantizer into, not something to
        ask for in a config.
      axis: negative. The channel axis, or the axis that is cut into groups or split.
      group: elements per group, for "group" (and for a frozen one).
      dynamic: the range is measured on the tensor itself at run time.
      zero_code: log grids only: the last code decodes to exactly 0 instead of the smallest power.
      boundary: for "split": index along `axis` at which the second part begins.
      narrow: signed codes are +-(2**(bits-1) - 1), so that the grid is symmetric about 0.
      scale_format: how a scale is stored: None float32; "f16" a float16 of 2^-24 to 65504 (bundles hold it
        in two bytes); "e4m3" a float8_e4m3fn (at most 448; NVFP4's block scales); "e8m0" a power of two,
        2^(floor(log2 max|x|) - floor(log2 of the grid's largest value)) (MXFP4, OCP Microscaling 1.0).
        Symmetric signed grids only.

    Raises:
      ValueError: a field is outside its domain or two fields contradict each other.
    """

    grid: str = "affine"
    symmetric: bool = False
    signed: bool = False
    granularity: str = "tensor"
    axis: int = -1
    group: int | None = None
    dynamic: bool = False
    zero_code: bool = False
    boundary: int | None = None
    narrow: bool = False
    scale_format: str | None = None

    def __post_init__(self):
        if self.grid not in GRIDS:
            raise ValueError(f"QuantSpec.grid is {self.grid!r}; choose one of {', '.join(GRIDS)}.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"QuantSpec.granularity is {self.granularity!r}; "
                f"choose one of {', '.join(GRANULARITIES)}."
            )
        if not isinstance(self.axis, int) or self.axis >= 0:
            raise ValueError(
                f"QuantSpec.axis is {self.axis!r}; count axes from the end with a negative "
                "integer, so that one spec serves tensors of any rank."
            )
        self._check_group()
        self._check_split()
        if self.grid not in ("log2", "log_sqrt2") and self.zero_code:
            raise ValueError(
                "QuantSpec.zero_code belongs to the log grids; an affine grid has 0 anyway."
            )
        if self.grid == "binary":
            self._check_binary()
        if self.grid in FLOATS or self.grid == "fp4":
            # They are nothing else: normalised so that equal specs compare equal.
            object.__setattr__(self, "signed", True)
            object.__setattr__(self, "symmetric", True)
        elif self.grid != "affine" and self.signed:
            raise ValueError(
                f"QuantSpec.signed with grid {self.grid!r}: a log grid holds non-negative values "
                "only; set signed=False."
            )
        if self.narrow and not self.signed:
            raise ValueError(
                "QuantSpec.narrow is for signed codes; an unsigned grid has no spare code."
            )
        if self.granularity == "token" and not self.dynamic:
            # One scale per token cannot be calibrated: normalised so that equal specs compare
            # equal.
            object.__setattr__(self, "dynamic", True)
        if self.granularity == "cell" and self.dynamic:
            raise ValueError(
                "QuantSpec granularity 'cell' holds measured ranges; set dynamic=False."
            )
        if self.scale_format not in (None, "f16", "e4m3", "e8m0"):
            raise ValueError(
                f"QuantSpec.scale_format is {self.scale_format!r}; use None, 'f16', 'e4m3' or 'e8m0'."
            )
        if self.scale_format and not (self.symmetric and self.signed):
            raise ValueError(
                f"QuantSpec.scale_format {self.scale_format!r} rounds the scale, which would move a zero "
                "point: use a signed symmetric grid."
            )

    def _check_binary(self):
        if self.granularity not in ("tensor", "channel") or self.dynamic or self.signed:
            raise ValueError(
                "QuantSpec grid 'binary' holds the codes 0 and 1 with one static scale per tensor or "
                f"channel; got signed={self.signed}, granularity {self.granularity!r}, "
                f"dynamic={self.dynamic}. Quantize this weight with 2 bits or more, or leave these out."
            )

    def _check_group(self):
        if self.granularity == "group" and self.group is None:
            raise ValueError("QuantSpec granularity 'group' needs `group`, the elements per group.")
        if self.group is None:
            return
        if self.granularity not in ("group", "cell"):
            raise ValueError(
                f"QuantSpec.group is {self.group} but granularity is {self.granularity!r}; "
                "use granularity='group' (with dynamic=True for per-token groups)."
            )
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"QuantSpec.group is {self.group!r}; it must be a positive integer.")

    def _check_split(self):
        if self.granularity != "split":
            if self.boundary is not None:
                raise ValueError(
                    f"QuantSpec.boundary is {self.boundary} but granularity is "
                    f"{self.granularity!r}; use granularity='split'."
                )
            return
        if (
            isinstance(self.boundary, bool)
            or not isinstance(self.boundary, int)
            or self.boundary < 1
        ):
            raise ValueError(
                f"QuantSpec granularity 'split' needs `boundary`, the index at which the second part "
                f"begins, as a positive integer; got {self.boundary!r}."
            )
        if self.axis not in (-1, -2) or self.dynamic:
            raise ValueError(
                "QuantSpec granularity 'split' cuts the contraction axis of an activation (axis=-1) "
                "or of a weight (axis=-2), and its two ranges are static (dynamic=False)."
            )


def implied_zero_point(spec: QuantSpec) -> float | None:
    """What the leaf `QParams.zero_point` holds under any range; None where it depends on the range.

    0 for symmetric integers, log grids and binary weights; for the formats of 4 bits, whose exponent bits are
    kept in that leaf, their number.
    """
    if spec.grid in FLOATS:
        return float(FLOATS[spec.grid][0])
    if spec.grid in ("log2", "log_sqrt2", "binary") or (spec.grid == "affine" and spec.symmetric):
        return 0.0
    return None


def code_range(spec: QuantSpec, bits: int, narrow: bool = False) -> tuple[int, int]:
    """The smallest and largest code of `bits` bits, both representable.

    Args:
      spec: decides signed or unsigned.
      bits: at least 1; at least 2 for a signed symmetric grid (1 bit would leave it no positive
        code).
      narrow: signed only: +-(2**(bits-1) - 1), whatever the spec says.

    Returns:
      (qmin, qmax) as Python integers: unsigned 0 .. 2**bits - 1, signed -2**(bits-1) .. 2**(bits-1)
        - 1.

    Raises:
      ValueError: bits is not a positive integer, or the combination has no usable code.

    A floating-point grid of 4 bits has the codes -7..7, narrow or not: one per value, and one zero.
    """
    if spec.grid in FLOATS or spec.grid == "fp4":
        if bits != 4:
            raise ValueError(f"the grid {spec.grid!r} has 4 bits, got {bits!r}.")
        return -7, 7
    if isinstance(bits, bool) or int(bits) != bits or not 1 <= bits <= 24:
        raise ValueError(
            f"bits is {bits!r}; it must be an integer from 1 to 24, the codes float32 holds."
        )
    bits, narrow = int(bits), narrow or spec.narrow
    if spec.grid == "binary" and bits != 1:
        raise ValueError(f"the grid 'binary' has 1 bit, not {bits}; use 'affine' for more.")
    if not spec.signed:
        if narrow:
            raise ValueError("narrow=True is for signed codes; an unsigned grid has no spare code.")
        return 0, 2**bits - 1
    if bits < 2 and (spec.symmetric or narrow):
        raise ValueError(
            "a signed symmetric grid of 1 bit has no positive code; use a binary quantizer instead."
        )
    half = 2 ** (bits - 1)
    return (-(half - 1) if narrow else -half), half - 1
