"""Writes the checkpoint fixtures zip.pt and legacy.pt. Needs torch (2.13.0+cpu was used):

    python tests/parity/torch_files/make_torch_files.py

Values are ramps, so that the test knows them without torch.
"""

import argparse
import pathlib

import torch

HERE = pathlib.Path(__file__).parent


def content():
    ramp = torch.arange(24, dtype=torch.float32)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        layer[0].weight.copy_(ramp[:6].reshape(2, 3))
        layer[0].bias.copy_(ramp[6:8])
    sliced = ramp.reshape(4, 6)[1:3, ::2]
    with_attribute = torch.nn.Parameter(ramp[:4].clone())
    with_attribute.tag = "kept nowhere"
    return {
        "state_dict": layer.state_dict(),
        "transposed": ramp.reshape(2, 3, 4).permute(2, 0, 1),
        "sliced": sliced,
        "same storage": ramp[5:7],
        "expanded": ramp[3:4].expand(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": (ramp / 8).half(),
        "bfloat16": (ramp / 8).bfloat16().reshape(4, 6).T,
        "int64": torch.arange(-3, 3),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "uint16": torch.arange(5).to(torch.uint16)[1:],
        "bool": torch.tensor([True, False, True]),
        "complex64": torch.complex(ramp[:2], ramp[2:4]),
        "parameter": torch.nn.Parameter(ramp[:4]),
        "parameter with attribute": with_attribute,
        "plain": [1, 2.5, None, "text", (True, b"bytes"), {3, 4}],
        "size": torch.Size([2, 3]),
        "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4),
        "optimizer": torch.optim.SGD(layer.parameters(), 0.1).state_dict(),
    }


if __name__ == "__main__":
    torch.save(content(), HERE / "zip.pt")
    torch.save(content(), HERE / "legacy.pt", _use_new_zipfile_serialization=False)
