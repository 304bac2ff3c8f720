"""What the sides of every claim differ in: (model, claim): {key: (with the part, without it)} of each pair.

Of a claim on two pairs the third entry is what the pairs differ in. A key that appears here uninvited is a
claim that measures something else than it says.
"""

DIFFERING = {
    ("unet", "ndtc"): [{"calibration.selector": ("ndtc", "random_steps")}],
    ("unet", "ndtc_one_step"): [{"calibration.selector": ("ndtc", "one_step")}],
    ("unet", "sampler_tensors"): [{"sampler.tensor_bits": (8, 0)}],
    ("unet", "selector"): [
        {"calibration.count": (0, 320), "calibration.selector": ("uniform", "random_steps")}
    ],
    ("unet", "split"): [{"qdiffusion_split": ("shortcut", "none")}],
    ("unet", "tiar"): [{"tfmq_tiar": (True, False)}],
    ("unet", "fsc"): [{"tfmq_fsc": (True, False)}],
    ("unet", "freeze"): [{"tfmq_freeze": (True, False), "tfmq_tiar": (True, False)}],
    ("unet", "tables_everywhere"): [{"tfmq_variant": ("faithful", "fixed")}],
    ("unet", "tdq"): [{"tdq.scales.shared": (False, True)}],
    ("unet", "tcr"): [{"tcaq.tcr": (True, False)}],
    ("unet", "tcr_paper"): [{"tcaq.factors.exponent": (1.0, "search"), "tcaq.tcr": (True, False)}],
    ("unet", "daq"): [{"tcaq.softmax.criterion": ("mle", "uniform")}],
    ("unet", "daq_target"): [{"tcaq.softmax.criterion": ("mle", "uniform")}],
    ("unet", "par"): [
        {
            "reconstruct.steps": (100, 150),
            "reconstruct.temporal_steps": (1000, 1500),
            "tcaq.rounds": (2, 0),
        }
    ],
    ("unet", "ptqd_slope"): [
        {
            "ptqd.bias": (False, True),
            "ptqd.calibrate_variance": (False, True),
            "method": ("ptqd", "rtn"),
        }
    ],
    ("unet", "ptqd_bias"): [
        {
            "ptqd.calibrate_variance": (False, True),
            "ptqd.slope": (False, True),
            "method": ("ptqd", "rtn"),
        }
    ],
    ("unet", "ptqd_all"): [{"method": ("ptqd", "rtn")}],
    ("unet", "ptqd_uncorrelated"): [{"ptqd.calibrate_variance": (True, False)}],
    ("unet", "ptqd_variance"): [{"ptqd.calibrate_variance": (True, False)}],
    ("unet", "ptqd_mixed"): [{"ptqd.step_bits": ((4, 5, 6, 7, 8), ())}],
    ("unet", "efficientdm"): [{"efficientdm.steps": (300, 0)}],
    ("unet", "efficientdm_lora_w2"): [{"efficientdm.lora": (True, False)}],
    ("unet", "scale_aware"): [{"efficientdm.student.rates": ("scale_aware", "mean")}],
    ("unet", "talsq"): [{"efficientdm.student.talsq": (True, False)}],
    ("unet", "distillation"): [{"efficientdm.source.target": ("teacher", "noise")}],
    ("unet", "efficientdm_beats_brecq"): [
        {"reconstruct.activation_steps": (0, 40), "method": ("efficientdm", "brecq")}
    ],
    ("unet", "efficientdm_beats_closed_form"): [{"method": ("efficientdm", "closed_form")}],
    ("unet", "efficientdm_beats_ptq4dm"): [
        {
            "calibration.count": (0, 256),
            "calibration.samples": (16, 128),
            "calibration.selector": ("uniform", "ndtc"),
            "method": ("efficientdm", "ptq4dm"),
        }
    ],
    ("unet", "efficientdm_beats_qdiffusion"): [
        {"reconstruct.activation_steps": (0, 40), "method": ("efficientdm", "qdiffusion")}
    ],
    ("unet", "efficientdm_beats_tfmq"): [{"method": ("efficientdm", "tfmq")}],
    ("unet", "efficientdm_beats_tdq"): [{"method": ("efficientdm", "tdq")}],
    ("unet", "efficientdm_beats_tcaq"): [
        {
            "reconstruct.steps": (150, 100),
            "reconstruct.temporal_steps": (2000, 1000),
            "method": ("efficientdm", "tcaq"),
        }
    ],
    ("unet", "efficientdm_beats_ptqd"): [
        {
            "ptqd.base": ("rtn", "brecq"),
            "reconstruct.activation_steps": (0, 40),
            "method": ("efficientdm", "ptqd"),
        }
    ],
    ("unet", "efficientdm_beats_svdquant"): [
        {"activations.observer": ("mse", "ema"), "method": ("efficientdm", "svdquant")}
    ],
    ("unet", "efficientdm_beats_every_ptq"): [],
    ("unet", "binarydm_ebb"): [{"binarydm.two_bases": (0.5, 2.0)}],
    ("unet", "binarydm_lrm"): [{"binarydm.lrm": (0.0001, 0.0)}],
    ("unet", "binarydm_progressive"): [{"binarydm.interval": (6, 0)}],
    ("dit", "ndtc"): [{"calibration.selector": ("ndtc", "random_steps")}],
    ("dit", "tdq"): [{"tdq.scales.shared": (False, True)}],
    ("dit", "tcr"): [{"tcaq.tcr": (True, False)}],
    ("dit", "par"): [
        {
            "reconstruct.steps": (100, 150),
            "reconstruct.temporal_steps": (1000, 1500),
            "tcaq.rounds": (2, 0),
        }
    ],
    ("dit", "ptqd_slope"): [
        {
            "ptqd.bias": (False, True),
            "ptqd.calibrate_variance": (False, True),
            "method": ("ptqd", "rtn"),
        }
    ],
    ("dit", "ptqd_bias"): [
        {
            "ptqd.calibrate_variance": (False, True),
            "ptqd.slope": (False, True),
            "method": ("ptqd", "rtn"),
        }
    ],
    ("dit", "ptqd_all"): [{"method": ("ptqd", "rtn")}],
    ("dit", "csb"): [{"ptq4dit.csb": (True, False)}],
    ("dit", "csb_alone"): [{"ptq4dit.csb": (True, False), "ptq4dit.ssc": (False, True)}],
    ("dit", "ssc"): [{"ptq4dit.ssc": (True, False)}],
    ("dit", "ptq4dit_reconstruction"): [{"ptq4dit.reconstruction": (True, False)}],
    ("dit", "svdquant_branch"): [{"svdquant.branch.rank": (4, 0)}],
    ("dit", "svdquant_branch_and_smoothing"): [
        {"svdquant.branch.rank": (4, 0), "svdquant.branch.smoothing": ("fast", "none")}
    ],
    ("dit", "svdquant_smoothing"): [{"svdquant.branch.smoothing": ("fast", "none")}],
    ("dit", "svdquant_groups"): [{"svdquant.group": (64, 0)}],
    ("dit", "svdquant_gain_50"): [
        {"svdquant.branch.rank": (4, 0)},
        {"svdquant.branch.rank": (4, 0)},
        {
            "svdquant.branch.alpha": (0.5, -1.0),
            "svdquant.branch.beta": (0.5, -1.0),
            "svdquant.branch.smoothing": ("full", "none"),
        },
    ],
    ("dit", "svdquant_gain_80"): [
        {"svdquant.branch.rank": (4, 0)},
        {"svdquant.branch.rank": (4, 0)},
        {"svdquant.branch.alpha": (0.8, 0.5), "svdquant.branch.beta": (0.2, 0.5)},
    ],
    ("dit", "svdquant_gain_100"): [
        {"svdquant.branch.rank": (4, 0)},
        {"svdquant.branch.rank": (4, 0)},
        {"svdquant.branch.alpha": (1.0, 0.8), "svdquant.branch.beta": (0.0, 0.2)},
    ],
    ("dit", "efficientdm_beats_svdquant"): [
        {"activations.observer": ("mse", "ema"), "method": ("efficientdm", "svdquant")}
    ],
    ("dit", "efficientdm_beats_closed_form"): [{"method": ("efficientdm", "closed_form")}],
    ("dit", "efficientdm_beats_ptq4dit"): [{"method": ("efficientdm", "ptq4dit")}],
    ("dit", "efficientdm_beats_every_ptq"): [],
}
