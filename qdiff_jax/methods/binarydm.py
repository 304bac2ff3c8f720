"""BinaryDM: weights of one bit, trained from two bases to one while following the teacher's main directions.

Source: Zheng et al. 2025 ("BinaryDM: Accurate Weight Binarization for Efficient Diffusion Models",
arXiv:2404.05662, version 5), read together with the official code, which is the method of versions 1 to 3.
One learned scale per output channel and one learned step per activation (LSQ); EBB: blocks of the head and
the tail begin with a second basis, which L_EBB takes away; LRM: features of every block along their leading
channel directions; progressive binarization from the deepest blocks on. Of these the code and the paper
differ, and this is the paper's form:

- The code keeps the second basis in the end ("1.1 bit"), and has no L_EBB and no second stage. Here the second
  basis goes, as soon as the prediction without it is within 5 % of the prediction with it, asked from half
  of the steps on; the paper drops it at a step fixed beforehand. Where it is never within that, it goes at
  nine tenths of the steps, and the log and the report say so.
- The code's LRM projects the width axis of its NCHW tensors; the paper's, and this one, the channels.
- The code begins every activation's step anew from each batch (a mismatch of two flags) and defaults to
  8 bits; here steps begin from calibrated ranges and are learned. Activations keep the grids of the plan,
  asymmetric by default.
- `sign(0)` is +1, as the paper says; `torch.sign` has 0.
- Progressive binarization is the code's, one group of blocks per step; the plan's weights of 8 bits, if it
  has any, begin with their block. `interval` widens it, 0 switches it off. Until an operand is quantized its
  scale rests, weight decay and moments included.
- What is exported is an average over the steps, begun anew where the second basis goes.
- The paper trains on images; the job has none, and its target is the full-precision prediction on sampling
  states. By hand, `stages.noising.Images` gives the paper's data, noised anew at every step.
- First and last layer: 8 bits in the paper (policy `common`), full precision in the code, the time embedding
  with them (`official:binarydm`).
"""

from __future__ import annotations

from typing import Any

from qdiff_jax.stages.calibrate import ActivationConfig, calibrate_activations
from qdiff_jax.stages.stage import Method, Model
from qdiff_jax.stages.train_binary import BinaryTrainConfig, train_binary
from qdiff_jax.stages.weights import calibrate_weights


def binarydm(
    model: Model,
    data: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    weight_method: str = "mse",
    activations: ActivationConfig = ActivationConfig(),
    config: BinaryTrainConfig = BinaryTrainConfig(),
    on_progress=None,
) -> Method:
    """Ranges of the activations in the full-precision network, scales of the weights, training.

    data: what is trained on, `stages.noising.Images` or a calibration set. activation_calibration visits
    every step of `timesteps`. weight_method: ranges of weights of more than one bit. The plan decides who is
    binary: weights of 1 bit are; those of more are trained as LSQ beside them.
    """
    return Method(
        "binarydm",
        (
            calibrate_activations(
                model, activation_calibration, timesteps, activations, on_progress=on_progress
            ),
            calibrate_weights(model, method=weight_method),
            train_binary(model, data, config, on_progress=on_progress),
        ),
        notes=f"tau={config.tau:g}, lrm={config.lrm:g}, two_bases={config.two_bases:g}, "
        f"interval={config.interval}",
    )
