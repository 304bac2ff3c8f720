"""Names and layouts of the published PyTorch DDPM checkpoints -> parameters of `UNetDDPM`.

Source: state dicts of pytorch_diffusion and ermongroup/ddim, module path by module path.
"""

import re
import zlib

import numpy as np

# (native module, our module); the first pattern that matches a whole name decides.
MODULES = (
    (r"temb\.dense\.(\d)", r"temb/dense_\1"),
    (r"conv_in", r"conv_in/conv"),
    (r"(down|up)\.(\d)\.block\.(\d)\.temb_proj", r"\1_\2_block_\3_temb_proj/dense"),
    (r"mid\.block_(\d)\.temb_proj", r"mid_block_\1_temb_proj/dense"),
    (r"(down|up)\.(\d)\.(block|attn)\.(\d)\.(\w+)", r"\1_\2_\3_\4/\5"),
    (r"mid\.(block|attn)_(\d)\.(\w+)", r"mid_\1_\2/\3"),
    (r"(down|up)\.(\d)\.(downsample|upsample)\.conv", r"\1_\2_\3/conv"),
    (r"(norm_out|conv_out)", r"out/\1"),
)


def our_path(key: str) -> tuple[str, ...]:
    """ "down.0.block.1.conv1.weight" -> ("down_0_block_1", "conv1", "kernel"). Raises KeyError."""
    native, leaf = key.rsplit(".", 1)
    for pattern, ours in MODULES:
        if re.fullmatch(pattern, native):
            module = re.sub(pattern, ours, native)
            norm = module.rsplit("/", 1)[1].startswith("norm")
            name = {"weight": "scale" if norm else "kernel", "bias": "bias"}[leaf]
            return (*module.split("/"), name)
    raise KeyError(f"{key} is no parameter of the DDPM U-Net")


def our_layout(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """OIHW -> HWIO, [out, in] -> [in, out]; 1x1 convolutions of attention -> dense [in, out]."""
    if tensor.ndim == 4 and ndim == 2:
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def port(state_dict: dict, shapes: dict) -> dict:
    """The state dict as a parameter tree, of exactly the names and shapes of `shapes`."""
    tree: dict = {}
    for key, tensor in state_dict.items():
        block, module, leaf = our_path(key)
        wanted = shapes[block][module][leaf]
        value = our_layout(tensor, len(wanted.shape))
        if value.shape != wanted.shape:
            raise ValueError(f"{key} is {value.shape}, the model has {wanted.shape}")
        slot = tree.setdefault(block, {}).setdefault(module, {})
        if leaf in slot:
            raise ValueError(f"{key} is the second tensor for {block}/{module}/{leaf}")
        slot[leaf] = value
    missing = {
        (block, module, leaf)
        for block, modules in shapes.items()
        for module, leaves in modules.items()
        for leaf in leaves
        if leaf not in tree.get(block, {}).get(module, {})
    }
    if missing:
        raise ValueError(f"the state dict lacks {sorted(missing)}")
    return tree


def seeded(key: str, shape, seed: int) -> np.ndarray:
    """The random tensor that the reference was given for this key: one legacy stream per name."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF)
    z = generator.standard_normal(int(np.prod(shape))).reshape(shape)
    if len(shape) > 1:
        return (z / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.2 * z if key.endswith("weight") else 0.1 * z).astype(np.float32)
