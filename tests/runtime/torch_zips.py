"""Checkpoints of `torch.save` written by hand, without torch: opcodes of tensors and archives around them."""

import struct
import zipfile

import numpy as np


def tensor_opcodes(key, shape, dtype):
    """The pickle of one contiguous tensor (shape: an int or a tuple) whose storage is `key`."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = int(np.prod(shape))
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    entry = f"(X\x07\0\0\0storagectorch\n{dtype}\n".encode()
    entry += b"".join(b"X" + struct.pack("<I", len(s)) + s.encode() for s in (key, "cpu"))
    entry += f"I{count}\ntQ".encode()
    sizes = "".join(f"I{n}\n" for n in shape)
    steps = "".join(f"I{n}\n" for n in strides)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + entry + f"I0\n({sizes}t({steps}tI00\nNtR".encode()
    )


def archive(path, entries, compression=zipfile.ZIP_STORED):
    """A torch archive {entry: {name: (storage class, array)}}; entry "" is the checkpoint itself. An entry
    that is bytes is the pickle of what lies there instead."""
    pickled, storages = b"(", {}
    for entry, state in entries.items():
        if entry:
            pickled += b"X" + struct.pack("<I", len(entry)) + entry.encode()
        if isinstance(state, bytes):
            pickled += state
            continue
        pickled += b"(" if entry else b""
        for name, (kind, array) in state.items():
            key = str(len(storages))
            storages[key] = array.tobytes()
            pickled += b"X" + struct.pack("<I", len(name)) + name.encode()
            pickled += tensor_opcodes(key, array.shape, kind)
        pickled += b"d" if entry else b""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled + b"d.")
        for key, raw in storages.items():
            file.writestr(f"archive/data/{key}", raw)
    return path
