"""ADM's evaluator (guided-diffusion's evaluations/evaluator.py) on small inputs, written out in numpy.

    python tests/parity/make_adm.py

writes cases/adm.npz. The evaluator needs TensorFlow 1 and its graph, which do not install on a current
Python, so nothing here ran it: each function below is its rule from its definition, in numpy and SciPy, in
the dtypes that it uses. Resizing has a second witness: torch-fidelity's conversion of the same graph
(make_eval_tools.py), run as published, gives the same network inputs.
"""

import pathlib

import eval_inputs
import numpy as np
import scipy.linalg

FEATURES = {"pool": (1, 2, 24), "spatial": (3, 4, 5)}  # seeds of generated and real, dimension


def network_input(images: np.ndarray, size: int = 299) -> np.ndarray:
    """The graph's own first steps: TensorFlow 1's bilinear resize (neither corners aligned nor pixels
    centred) of float32 images in 0..255, then (x - 128) / 128. float32 [B, size, size, 3]."""

    def taps(into):
        place = np.arange(size, dtype=np.float32) * np.float32(into / size)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, into - 1), place - low.astype(np.float32)

    x = images.astype(np.float32)
    top, bottom, down = taps(x.shape[1])
    left, right, across = taps(x.shape[2])
    across, down = across[None, None, :, None], down[None, :, None, None]

    def row(index):
        near, far = x[:, index][:, :, left], x[:, index][:, :, right]
        return near + (far - near) * across

    above, below = row(top), row(bottom)
    return ((above + (below - above) * down) - np.float32(128)) * np.float32(1 / 128)


def frechet(generated: np.ndarray, real: np.ndarray) -> float:
    """FID on pooled features, sFID on spatial ones: float64 moments of float32 features, `sqrtm` of the
    product, and 1e-6 on the diagonals if that is not finite."""
    moments = [
        (np.mean(x.astype(float), axis=0), np.cov(x, rowvar=False)) for x in (generated, real)
    ]
    (mu1, sigma1), (mu2, sigma2) = moments
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    if not np.isfinite(root).all():
        offset = 1e-6 * np.eye(len(sigma1))
        root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    assert np.abs(np.imag(root)).max() < 1e-3
    shift = mu1 - mu2
    return float(shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real))


def inception_score(logits: np.ndarray, split_size: int) -> float:
    """Softmax in float32, splits of a fixed size in file order, the last one as large as is left."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = raised / raised.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(p), split_size):
        part = p[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(generated: np.ndarray, real: np.ndarray, dtype) -> list:
    """Squared distances of the low-precision copies, in float32 if one of them overflows."""

    def squared(u, v):
        with np.errstate(over="ignore", invalid="ignore"):
            low_u, low_v = u.astype(dtype), v.astype(dtype)
            norm_u = np.square(low_u).astype(np.float32).sum(axis=1).astype(dtype)[:, None]
            norm_v = np.square(low_v).astype(np.float32).sum(axis=1).astype(dtype)[None, :]
            product = (low_u.astype(np.float32) @ low_v.astype(np.float32).T).astype(dtype)
            low = np.maximum(norm_u - dtype(2) * product + norm_v, dtype(0))
        if np.isfinite(low).all():
            return low.astype(np.float32)
        norms = np.square(u).sum(axis=1)[:, None], np.square(v).sum(axis=1)[None, :]
        return np.maximum(norms[0] - np.float32(2) * (u @ v.T) + norms[1], np.float32(0))

    radii = [np.partition(squared(x, x), 3, axis=1)[:, 3] for x in (generated, real)]
    between = squared(real, generated)
    precision = (between <= radii[1][:, None]).any(axis=0).mean()
    recall = (between <= radii[0][None, :]).any(axis=1).mean()
    return [float(precision), float(recall)]


if __name__ == "__main__":
    case: dict = {}
    for size in eval_inputs.SIZES:
        case[f"resize/{size}"] = network_input(eval_inputs.images(size))[eval_inputs.PICKED]
    sets = {}
    for layer, (one, two, dim) in FEATURES.items():
        real = eval_inputs.features(two, 110, dim) * np.float32(1.1)
        sets[layer] = eval_inputs.features(one, 90, dim), real
    case["fid"], case["sfid"] = (frechet(*sets[layer]) for layer in ("pool", "spatial"))
    logits = eval_inputs.logits()
    case["is"] = inception_score(logits, split_size=5000)
    case["is/splits_of_40"] = inception_score(logits, split_size=40)
    generated, real = sets["pool"]
    case["pr"] = precision_recall(generated, real, np.float16)
    # Far from zero, where float16 distances are coarse and the result moves.
    case["pr/coarse"] = precision_recall(generated + 8, real + 8, np.float16)
    # Squares of these leave float16's range, which sends the evaluator to float32.
    case["pr/overflow"] = precision_recall(generated * 100, real * 100, np.float16)
    out = pathlib.Path(__file__).parent / "cases" / "adm.npz"
    np.savez_compressed(out, **{name: np.asarray(value) for name, value in case.items()})
    for name, value in case.items():
        print(name, np.shape(value) if np.size(value) > 4 else np.asarray(value))
