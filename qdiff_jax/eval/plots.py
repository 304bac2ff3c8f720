"""The pictures of a comparison, each a function (arrays, path) -> path of a PNG, with a PDF beside it.

Every picture has a builder `*_figure` that returns the matplotlib `Figure`, made through the object
interface: nothing touches pyplot's global state, so pictures may be drawn from any thread and with
no display. Mappings are {variant name: array}, and a variant keeps its colour, marker and line
style across pictures when every mapping lists the variants in the same order.
"""

import io
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qdiff_jax.eval.curves import INK, lines_figure
from qdiff_jax.eval.files import write_atomic

_DPI = 150
_MAX_BITS = 6.0  # beyond this an 8-bit quantizer is useless at that step anyway


def render(figure: Figure, dpi: int) -> tuple[bytes, bytes]:
    """(PNG at `dpi`, PDF) of a figure; equal figures give equal bytes."""
    FigureCanvasAgg(figure)
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, facecolor="white")
    fonts = logging.getLogger("fontTools")
    level = fonts.level
    fonts.setLevel(logging.WARNING)  # it tells of every glyph
    try:
        # Type 42 keeps text as text in the file; publishers refuse the default Type 3. No date, so
        # that equal figures are equal files.
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            figure.savefig(pdf, format="pdf", facecolor="white", metadata={"CreationDate": None})
    finally:
        fonts.setLevel(level)
    return png.getvalue(), pdf.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike) -> pathlib.Path:
    """Writes a figure to the PNG `path` and beside it, under the same name, as PDF; each appears whole or
    not at all. Returns the path of the PNG."""
    path = pathlib.Path(path)
    png, pdf = render(figure, _DPI)
    write_atomic(path.with_suffix(".pdf"), pdf)
    return write_atomic(path, png)


# ------------------------------------------------------------------------------------- samples


def _block(images: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """[N, H, W, C] in [-1, 1] -> one RGB tile in [0, 1], white between images."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    tile = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3))
    broken = ~np.isfinite(images)
    pixels = np.clip(np.where(broken, 0.0, images) * 0.5 + 0.5, 0.0, 1.0)
    pixels = np.broadcast_to(pixels, (count, height, width, 3)).copy()
    pixels[broken.any(axis=-1)] = (1.0, 0.0, 1.0)  # a diverged pixel must not pass for a grey one
    for index in range(count):
        top = (index // columns) * (height + gap)
        left = (index % columns) * (width + gap)
        tile[top : top + height, left : left + width] = pixels[index]
    return tile


def samples_figure(images: Mapping[str, np.ndarray], columns: int = 2) -> Figure:
    """Sample grids side by side: a block of `columns` image columns for every variant.

    Args:
      images: variant name -> [N, H, W, C] in [-1, 1], C 1 or 3; image n of every variant comes from
        the same noise, so that the same place in every block is comparable. Values outside the
        range are clipped and pixels that are not finite are drawn magenta.
      columns: images in a row of a block.

    Raises ValueError when there are no variants, or their shapes differ or are not images.
    """
    arrays = {name: np.asarray(value, np.float64) for name, value in images.items()}
    shapes = {name: value.shape for name, value in arrays.items()}
    shape = next(iter(shapes.values()), ())
    if (
        len(shape) != 4
        or shape[-1] not in (1, 3)
        or shape[0] == 0
        or set(shapes.values()) != {shape}
    ):
        raise ValueError(
            f"samples need images [N, H, W, 1 or 3] of one shape for every variant: got {shapes}."
        )
    columns = min(columns, shape[0])
    if columns < 1:
        raise ValueError(f"samples need at least one image column per variant, got {columns}.")
    rows = -(-shape[0] // columns)
    # The block is wide enough for its images and for its title in any case.
    block_width = max(0.8 * columns, 0.1 * max(map(len, arrays)) + 0.1)
    cell = block_width / columns * shape[1] / shape[2]
    size = (block_width * len(arrays) + 0.9, cell * rows + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    if len(arrays) > 1:  # of one variant there is nothing to set beside
        figure.suptitle("Samples from the same noise", fontsize=11, color=INK)
    grid = figure.subplots(1, len(arrays), squeeze=False)[0]
    gap = max(1, shape[2] // 16)
    for axes, (name, value) in zip(grid, arrays.items()):
        axes.imshow(_block(value, columns, gap), interpolation="nearest")
        axes.set_title(name, fontsize=9, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    first = [row * columns for row in range(rows)]
    last = [min(start + columns, shape[0]) - 1 for start in first]
    labels = [str(a) if a == b else f"{a}\u2013{b}" for a, b in zip(first, last)]
    grid[0].set_yticks([row * (shape[1] + gap) + shape[1] / 2 for row in range(rows)], labels)
    grid[0].tick_params(axis="y", length=0, labelsize=7, colors=INK)
    grid[0].set_ylabel("noise sample", fontsize=8, color=INK)
    return figure


def plot_samples(
    images: Mapping[str, np.ndarray], path: str | os.PathLike, columns: int = 2
) -> pathlib.Path:
    """Writes `samples_figure` to `path`."""
    return save_figure(samples_figure(images, columns), path)


# ---------------------------------------------------------------------- a line for every variant


def error_figure(timesteps: np.ndarray, errors: Mapping[str, np.ndarray]) -> Figure:
    """The teacher-forced error of eps by timestep, on a logarithmic axis.

    Args:
      timesteps: [S], in any order.
      errors: variant name -> [S] relative MSE (`Agreement.rel_mse_rows`). A variant that is zero
        everywhere, as full precision is against itself, is named below the picture instead.

    Raises ValueError when a shape does not fit.
    """
    title = "Error of predicted noise along the full-precision trajectory"
    return lines_figure(timesteps, errors, title, "relative MSE of \u03b5 (no unit)")


def plot_error(
    timesteps: np.ndarray, errors: Mapping[str, np.ndarray], path: str | os.PathLike
) -> pathlib.Path:
    """Writes `error_figure` to `path`."""
    return save_figure(error_figure(timesteps, errors), path)


def temporal_figure(timesteps: np.ndarray, distances: Mapping[str, np.ndarray]) -> Figure:
    """The cosine distance of the temporal features by timestep, on a logarithmic axis.

    Args:
      timesteps: [R], in any order.
      distances: variant name -> [R], 1 - cos averaged over sites
        (`TemporalAgreement.cosine_rows`).

    Raises ValueError when a shape does not fit.
    """
    title = "Temporal features: distance from full precision"
    return lines_figure(timesteps, distances, title, "1 \u2212 cosine, mean over sites (no unit)")


def plot_temporal(
    timesteps: np.ndarray, distances: Mapping[str, np.ndarray], path: str | os.PathLike
) -> pathlib.Path:
    """Writes `temporal_figure` to `path`."""
    return save_figure(temporal_figure(timesteps, distances), path)


# ------------------------------------------------------------------------------ activation ranges


def ranges_figure(
    timesteps: np.ndarray, lo: np.ndarray, hi: np.ndarray, names: Sequence[str]
) -> Figure:
    """How the range of every activation changes with the timestep, as a heat-map.

    The colour is log2(range shared by all timesteps / range at t): the bits that a quantizer with
    one range for all timesteps gives away at t. The shared range stands at the right of each row.
    One row per site stays readable for the sixty or so sites of a U-Net, where as many small
    charts would not.

    Args:
      timesteps: [R], in any order.
      lo, hi: [R, S] floating, lo <= hi: what the observer of each site saw at each timestep.
      names: S site names, drawn from top to bottom in this order (that of execution).

    Raises ValueError when the shapes do not fit, or a range is empty or not finite.
    """
    timesteps, lo, hi = (np.asarray(v, np.float64) for v in (timesteps, lo, hi))
    if not names or lo.shape != (len(timesteps), len(names)) or hi.shape != lo.shape:
        raise ValueError(
            f"activation ranges need lo and hi [R, S] for R={len(timesteps)} timesteps and "
            f"S={len(names)} sites: got {lo.shape} and {hi.shape}."
        )
    bad = ~(np.isfinite(lo) & np.isfinite(hi) & (lo <= hi)).all(axis=0)
    if bad.any():
        named = [names[index] for index in np.flatnonzero(bad)]
        raise ValueError(
            f"activation ranges must be finite with lo <= hi; they are not at {named}."
        )
    order = np.argsort(timesteps, kind="stable")
    timesteps, lo, hi = timesteps[order], lo[order], hi[order]
    low, high = lo.min(axis=0), hi.max(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.log2((high - low)[None, :] / (hi - lo))
    lost = np.where(np.isnan(lost), 0.0, lost)  # a site that is constant at every t loses nothing
    top = float(np.clip(np.ceil(lost.max()), 1.0, _MAX_BITS))

    height = max(1.9 + 0.17 * len(names), 4.2)  # the labels of the axes need some room
    figure = Figure(figsize=(9.0, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots()
    picture = axes.imshow(
        lost.T, aspect="auto", cmap="cividis", vmin=0.0, vmax=top, interpolation="nearest"
    )
    ticks = np.unique(np.linspace(0, len(timesteps) - 1, min(len(timesteps), 10)).round())
    ticks = ticks.astype(int)
    axes.set_xticks(ticks, [f"{timesteps[index]:.4g}" for index in ticks], fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("timestep t  (small: near the image; large: noise)", color=INK)
    axes.set_title("Activation ranges over the sampler's timesteps", fontsize=11, color=INK)
    right = axes.secondary_yaxis("right")
    shared = [f"{a:.3g} \u2026 {b:.3g}" for a, b in zip(low, high)]
    right.set_yticks(
        range(len(names)), [text.replace("-", "\u2212") for text in shared], fontsize=7
    )
    right.tick_params(axis="y", length=0)
    right.set_ylabel("range over all timesteps (activation units)", fontsize=8, color=INK)
    bar = figure.colorbar(
        picture,
        ax=axes,
        location="bottom",
        shrink=0.6,
        aspect=40,
        pad=0.1 / height,  # a fraction of the height, which would be far away in a tall figure
        extend="max" if lost.max() > top else "neither",
    )
    bar.set_label("bits lost at t by one shared range: log2(shared / range at t)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def plot_ranges(
    timesteps: np.ndarray,
    lo: np.ndarray,
    hi: np.ndarray,
    names: Sequence[str],
    path: str | os.PathLike,
) -> pathlib.Path:
    """Writes `ranges_figure` to `path`."""
    return save_figure(ranges_figure(timesteps, lo, hi, names), path)
