"""BinaryDM: weights of one bit, trained from two bases to one while following the teacher's main directions.

Source: Zheng et al. 2025 ("BinaryDM: Accurate Weight Binarization for Efficient Diffusion Models",
arXiv:2404.05662, version 5), read together with the official code, which is the method of versions 1 to 3.
One learned scale per output channel and one learned step per activation (LSQ); EBB: blocks of the head and
the tail begin with a second basis, which L_EBB takes away; LRM: features of every block along their leading
channel directions; progressive binarization from the deepest blocks on. Of these the code and the paper
differ; this is the paper's form where nothing else is said:

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
- The paper trains on images, and so does the job where `data.source` names some, noised anew at every step.
  Without, its target is the full-precision prediction on all states of the recorded trajectories but those
  of the last few, on which the transition is judged.
- The paper drops the second basis after half of the steps, so that the other half is stage 2; here what is
  still missed at nine tenths leaves one tenth for it.
- The policy decides who is binary. `two_bases` 0.5 takes the paper's rule (blocks at half of the input's side
  and more), which is about 15 % of its network's parameters, and of the shipped U-Net's, whose blocks differ
  less in width, 44 %.
- First and last layer: 8 bits in the paper (policy `common`); full precision in the code, the time embedding
  with them (`official:binarydm`, which the config takes).
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
    held_out: Any,
    activation_calibration: Any,
    timesteps: Any,
    *,
    weight_method: str = "mse",
    activations: ActivationConfig = ActivationConfig(),
    config: BinaryTrainConfig = BinaryTrainConfig(),
    on_progress=None,
) -> Method:
    """Ranges of the activations in the full-precision network, scales of the weights, training.

    data: what is trained on, `stages.noising.Images` or a calibration set. held_out: the same of other samples,
    which the transition is judged on. activation_calibration visits
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
            train_binary(model, data, held_out, config, on_progress=on_progress),
        ),
        notes=f"tau={config.tau:g}, lrm={config.lrm:g}, two_bases={config.two_bases:g}, "
        f"interval={config.interval}",
    )
