"""The settings of a recipe's parts: each method's own, under the same words of size."""

import importlib

from qdiff_jax.methods.recipes import JOIN, PARTS

# Methods with a sub-dict of their own, and which keys of others their configs set for their size. Of PTQ4DiT a
# recipe takes CSB, and of PTQD the correction: both on the calibration set of the others.
SIZED = {
    "tdq": ("calibration",),
    "tcaq": ("reconstruct", "calibration"),
    "tfmq": ("calibration", "activations", "tfmq_split"),
    "ptq4dit": (),
    "svdquant": (),
    "qdiffusion": ("reconstruct", "calibration"),
    "efficientdm": ("activations",),
    "binarydm": ("activations", "calibration", "data"),
}
# Their configs know one model alone.
ONE_MODEL = ("ptq4dit", "binarydm")


def take_settings(config, recipe, words, model):
    """Write into `config` what the configs of the recipe's methods set. words: "laptop", "smoke" or "".

    Where two parts share a sub-dict the later one's stands. Unknown parts are left to whoever checks the
    recipe.
    """
    parts = [PARTS[word.strip()] for word in recipe.split(JOIN) if word.strip() in PARTS]
    for method in dict.fromkeys(part.method for part in parts if part.method in SIZED):
        asked = words if method in ONE_MODEL else f"{words},model={model}"
        own = importlib.import_module(f"configs.methods.{method}").get_config(asked)
        if method in own:
            config[method] = own[method]
        for name in SIZED[method]:
            if name in config and hasattr(config[name], "update"):
                config[name].update(own[name])
            else:
                config[name] = own[name]
