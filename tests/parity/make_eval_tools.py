"""Runs the published evaluation tools on small inputs and stores what they return.

    pip install torch torchvision scipy==1.17.1 scikit-image==0.26.0 torch-fidelity==0.4.0 \
        pytorch-fid==0.3.0 clean-fid==0.1.35 lpips==0.1.4
    python tests/parity/make_eval_tools.py

The ADM evaluator (guided-diffusion's evaluations/evaluator.py, TensorFlow 1) does not install on a
current Python; make_adm.py has its rules in numpy.
"""

import pathlib
import types

import eval_inputs
import numpy as np
import scipy.linalg
import torch

# torchvision's compiled part is not needed, and its wheel may not fit the torch that is there.
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
_library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")

import cleanfid.fid as clean  # noqa: E402
import cleanfid.resize  # noqa: E402
import lpips  # noqa: E402
import pytorch_fid.fid_score as pytorch_fid  # noqa: E402
import torch_fidelity.metric_fid  # noqa: E402
import torch_fidelity.metric_isc  # noqa: E402
import torch_fidelity.metric_kid  # noqa: E402
import torch_fidelity.metric_prc  # noqa: E402
from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # noqa: E402
from torch_fidelity.interpolate_compat_tensorflow import (  # noqa: E402
    interpolate_bilinear_2d_like_tensorflow1x,
)


def resized(case: dict) -> None:
    """The network's inputs [2, 13, 11, 3], at the picked pixels, in each tool's own range."""
    for size in eval_inputs.SIZES:
        images = eval_inputs.images(size)
        nchw = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        tf1 = interpolate_bilinear_2d_like_tensorflow1x(nchw, (299, 299), align_corners=False)
        half = torch.nn.functional.interpolate(
            nchw / 255, size=(299, 299), mode="bilinear", align_corners=False
        )
        bicubic = cleanfid.resize.build_resizer("clean")
        found = {
            "torch-fidelity": (tf1.permute(0, 2, 3, 1).numpy() - 128) / 128,
            "pytorch-fid": 2 * half.permute(0, 2, 3, 1).numpy() - 1,
            "clean-fid": (np.stack([bicubic(image) for image in images]) - 128) / 128,
        }
        for tool, values in found.items():
            case[f"resize/{tool}/{size}"] = values[eval_inputs.PICKED].astype(np.float32)


def distributions(case: dict) -> None:
    generated, real = eval_inputs.features(1, 90), eval_inputs.features(2, 110)
    real = real * np.float32(1.1)
    a, b = torch.from_numpy(generated), torch.from_numpy(real)
    statistics = torch_fidelity.metric_fid.fid_features_to_statistics
    case["fid/torch-fidelity"] = torch_fidelity.metric_fid.fid_statistics_to_metric(
        statistics(a), statistics(b), False
    )["frechet_inception_distance"]
    moments = [
        m for x in (generated, real) for m in (x.astype(float).mean(0), np.cov(x.astype(float).T))
    ]
    # Both call sqrtm with an argument that SciPy has dropped since.
    root = types.SimpleNamespace(sqrtm=lambda x, disp: (scipy.linalg.sqrtm(x), 0.0))
    pytorch_fid.linalg = clean.linalg = root
    case["fid/pytorch-fid"] = pytorch_fid.calculate_frechet_distance(*moments)
    case["fid/clean-fid"] = clean.frechet_distance(*moments)

    found = torch_fidelity.metric_kid.kid_features_to_metric(
        a, b, kid_subsets=8, kid_subset_size=40, verbose=False, rng_seed=2020
    )
    case["kid/torch-fidelity"] = [
        found["kernel_inception_distance_mean"],
        found["kernel_inception_distance_std"],
    ]
    np.random.seed(11)
    case["kid/clean-fid"] = clean.kernel_distance(generated, real, 8, 40)

    logits = torch.from_numpy(eval_inputs.logits())
    found = torch_fidelity.metric_isc.isc_features_to_metric(logits, splits=10)
    case["is/torch-fidelity"] = [found["inception_score_mean"], found["inception_score_std"]]

    found = torch_fidelity.metric_prc.prc_features_to_metric(
        a, b, prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False
    )
    case["pr/torch-fidelity"] = [found["precision"], found["recall"]]


def pairs(case: dict) -> None:
    first, second = eval_inputs.lpips_pair()
    case["ssim"] = [
        structural_similarity(
            x.astype(np.float64),
            y.astype(np.float64),
            channel_axis=-1,
            data_range=2.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(first, second)
    ]
    case["psnr"] = [
        peak_signal_noise_ratio(x.astype(np.float64), y.astype(np.float64), data_range=2.0)
        for x, y in zip(first, second)
    ]
    for net in ("alex", "vgg"):
        trunk, lin = eval_inputs.lpips_weights(net)
        metric = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
        state = {name: torch.from_numpy(value) for name, value in lin.items()}
        for part in ("slice1", "slice2", "slice3", "slice4", "slice5"):
            for index in getattr(metric.net, part)._modules:
                for kind in ("weight", "bias"):
                    if f"features.{index}.{kind}" in trunk:
                        value = torch.from_numpy(trunk[f"features.{index}.{kind}"])
                        state[f"net.{part}.{index}.{kind}"] = value
        missing, unexpected = metric.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert all("scaling_layer" in n or n.startswith("lins.") for n in missing), missing
        with torch.no_grad():
            x, y = (torch.from_numpy(v).permute(0, 3, 1, 2) for v in (first, second))
            case[f"lpips/{net}"] = metric(x, y).reshape(-1).numpy().astype(np.float64)


if __name__ == "__main__":
    case: dict = {}
    resized(case)
    distributions(case)
    pairs(case)
    out = pathlib.Path(__file__).parent / "cases" / "eval_tools.npz"
    np.savez_compressed(out, **{name: np.asarray(value) for name, value in case.items()})
    for name, value in case.items():
        print(name, np.shape(value) if np.size(value) > 4 else np.asarray(value))
