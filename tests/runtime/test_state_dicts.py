"""Any published weights file as named tensors that are read when asked for."""

import json
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.models.port.strict import take, with_moving_average
from qdiff_jax.runtime.state_dicts import (
    LazyTensor,
    load_config,
    load_state_dict,
    state_dicts_in,
    to_device,
)
from qdiff_jax.runtime.torch_files import load_torch
from qdiff_jax.runtime.torch_storages import Deferred

from .torch_zips import archive, tensor_opcodes

FIXTURES = pathlib.Path(__file__).parents[1] / "parity" / "torch_files"
FORMATS = ("zip", "legacy")
RAMP = np.arange(24, dtype=np.float32)
STATE = {"a.weight": RAMP.reshape(4, 6), "a.bias": RAMP[:4], "steps": np.array(7)}


def equal(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        tensor = np.asarray(found[key])
        assert found[key].shape == value.shape == tensor.shape
        assert found[key].dtype == tensor.dtype
        np.testing.assert_array_equal(tensor, value, strict=True)


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_left_in_the_file_are_those_read_at_once(name):
    """Views, windows, shared storages, every dtype: all that the fixture of torch has."""
    path = FIXTURES / f"{name}.pt"
    later, now = load_torch(path, later=True), load_torch(path)
    compared = 0
    for key, tensor in now.items():
        if isinstance(tensor, np.ndarray):
            assert isinstance(later[key], Deferred)
            assert later[key].shape == tensor.shape
            np.testing.assert_array_equal(later[key].read(), tensor, strict=True)
            compared += 1
        elif key == "plain":
            assert later[key] == tensor
    assert compared == 15


@pytest.mark.parametrize("name", FORMATS)
def test_the_state_dict_of_a_checkpoint(name):
    state = load_state_dict(FIXTURES / f"{name}.pt")
    inside = load_torch(FIXTURES / f"{name}.pt")["state_dict"]
    equal(state, inside)
    with pytest.raises(ValueError, match=r"no state dict under 'ema'; it has 'state_dict'"):
        load_state_dict(FIXTURES / f"{name}.pt", entry="ema")


HALF = {
    "w": ("HalfStorage", (RAMP / 8).astype(np.float16)),
    "b": ("BFloat16Storage", (RAMP / 8).astype(ml_dtypes.bfloat16)),
    "d": ("DoubleStorage", RAMP.astype(np.float64)),
    "n": ("LongStorage", np.arange(3)),
}


def test_half_precision_becomes_float32(tmp_path):
    expected = {"w": RAMP / 8, "b": RAMP / 8, "d": RAMP.astype(np.float64), "n": np.arange(3)}
    equal(load_state_dict(archive(tmp_path / "half.ckpt", {"": HALF})), expected)
    tensors = {key: value for key, (_, value) in HALF.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "half.safetensors")
    found = load_state_dict(tmp_path / "half.safetensors")
    equal({key: found[key] for key in expected}, expected)


def test_which_state_dict(tmp_path):
    one, two = {"w": ("FloatStorage", RAMP[:2])}, {"w": ("FloatStorage", RAMP[2:4])}
    path = archive(tmp_path / "c.pt", {"model": one, "ema": two})
    with pytest.raises(ValueError, match=r"has several \('model', 'ema'\): say which as `entry`"):
        load_state_dict(path)
    np.testing.assert_array_equal(load_state_dict(path, "ema")["w"], [2, 3])
    archive(path, {"state_dict": one, "ema": two})
    np.testing.assert_array_equal(load_state_dict(path)["w"], [0, 1])
    archive(path, {"ema": two})
    np.testing.assert_array_equal(load_state_dict(path)["w"], [2, 3])
    archive(path, {"": {"module.w": one["w"], "module.b": one["w"]}})
    assert list(load_state_dict(path)) == ["w", "b"]
    archive(path, {"": {"module.w": one["w"], "b": one["w"]}})
    assert list(load_state_dict(path)) == ["module.w", "b"]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"].")
    with pytest.raises(ValueError, match="holds a value of type list, no state dict"):
        load_state_dict(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"}.")
    with pytest.raises(ValueError, match="should hold one state dict .* and has none: it is empty"):
        load_state_dict(path)


def raw(path, pickled, storages=()):
    """A torch archive of this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled + b".")
        for key, array in enumerate(storages):
            file.writestr(f"archive/data/{key}", array.tobytes())
    return path


def named(name, opcodes):
    return b"X" + struct.pack("<I", len(name)) + name.encode() + opcodes


def test_what_keeps_a_file_from_being_a_state_dict(tmp_path):
    one, path = tensor_opcodes("0", 2, "FloatStorage"), tmp_path / "c.pt"
    odd = b"(" + named("w", one) + named("step", b"I3\n") + b"d"
    for pickled, message in (
        (one, "holds a lone tensor, no state dict"),
        (odd, "has none: 'step' is a value of type int; save it again with tensors only"),
        (
            b"(" + named("net", odd) + named("epoch", b"I3\n") + b"d",
            "none: in 'net' 'step' is a value of type int",
        ),
        (b"(cnets\nNet\no", "holds a whole object of the class nets.Net, no state dict"),
    ):
        for read in (load_state_dict, state_dicts_in):
            with pytest.raises(ValueError, match=message):
                read(raw(path, pickled, [RAMP[:2]]))


def test_all_state_dicts_of_a_file(tmp_path):
    one, two = {"module.w": ("FloatStorage", RAMP[:2])}, {"w": ("FloatStorage", RAMP[2:4])}
    path = archive(tmp_path / "c.pt", {"model": one, "ema": two})
    found = state_dicts_in(path).found
    assert list(found) == ["model", "ema"]
    equal(found["model"], {"w": RAMP[:2]})
    equal(state_dicts_in(archive(path, {"": two})).found[""], {"w": RAMP[2:4]})
    # As DDPMs are trained: (model, optimizer, epoch, step, averages).
    states = [
        b"(" + named("w", tensor_opcodes(key, 2, "FloatStorage")) + b"d" for key in ("0", "1")
    ]
    trained = b"(" + states[0] + b"}I1\nI2\n" + states[1] + b"l"
    found = state_dicts_in(raw(path, trained, [RAMP[:2], RAMP[2:4]])).found
    assert list(found) == ["model", "ema"]
    equal(found["ema"], {"w": RAMP[2:4]})
    equal(load_state_dict(path, "model"), {"w": RAMP[:2]})
    safetensors.numpy.save_file(STATE, tmp_path / "c.safetensors")
    assert list(state_dicts_in(tmp_path / "c.safetensors").found) == [""]


def test_a_state_dict_with_something_else_in_it_is_not_passed_over(tmp_path):
    """Else the moving average beside it would be taken unsaid."""
    one = {"w": ("FloatStorage", RAMP[:2])}
    path = archive(tmp_path / "c.pt", {"state_dict": one, "ema": one})
    whole = zipfile.ZipFile(path).read("archive/data.pkl")
    head = b"X" + struct.pack("<I", 10) + b"state_dict("
    assert head in whole

    def write(pickled):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickled)
            for key in "01":
                file.writestr(f"archive/data/{key}", RAMP[:2].tobytes())

    write(whole.replace(head, head + b"X" + struct.pack("<I", 4) + b"stepI7\n"))
    for entry in (None, "state_dict"):
        with pytest.raises(
            ValueError,
            match=r"'state_dict' is no state dict .*: 'step' is a value of type int; save",
        ):
            load_state_dict(path, entry)
    entries = state_dicts_in(path)
    assert list(entries.found) == ["ema"]
    assert (
        "'state_dict' is no state dict (named tensors): 'step' is a value"
        in entries.odd["state_dict"]
    )
    np.testing.assert_array_equal(load_state_dict(path, "ema")["w"], [0, 1])
    empty = (
        b"("
        + head[:-1]
        + b"}"
        + b"X"
        + struct.pack("<I", 3)
        + b"ema(X"
        + struct.pack("<I", 1)
        + b"w"
    )
    write(empty + tensor_opcodes("0", 2, "FloatStorage") + b"dd.")
    with pytest.raises(ValueError, match="'state_dict' is no state dict .*: it is empty"):
        load_state_dict(path)


def test_a_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "model.ckpt"
    safetensors.numpy.save_file(STATE, path)
    equal(load_state_dict(path), {key: STATE[key] for key in sorted(STATE)})
    with pytest.raises(ValueError, match="has no entry 'ema'"):
        load_state_dict(path, "ema")
    zipped = tmp_path / "model.pth"
    zipped.write_bytes((FIXTURES / "zip.pt").read_bytes())
    assert list(load_state_dict(zipped))[0] == "0.weight"
    for name in FORMATS:
        named = tmp_path / "model.safetensors"
        named.write_bytes((FIXTURES / f"{name}.pt").read_bytes())
        assert list(load_state_dict(named))[0] == "0.weight"


def test_a_folder_of_one_model(tmp_path):
    with pytest.raises(ValueError, match=r"has none of diffusion.*; it has no file"):
        load_state_dict(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"it has weights\.bin \(give a file by its own path"):
        load_state_dict(tmp_path)
    archive(tmp_path / "pytorch_model.bin", {"": HALF})
    assert list(load_state_dict(tmp_path)) == list(HALF)
    safetensors.numpy.save_file(STATE, tmp_path / "model.safetensors")
    assert sorted(load_state_dict(tmp_path)) == sorted(STATE)  # preferred to the pickle


def test_a_pipelines_folder_names_its_networks(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).mkdir()
    for part in ("unet", "vae"):
        (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="whole pipeline; give .*: unet, vae"):
        load_state_dict(tmp_path)


def sharded(folder, shards, index=None):
    for name, state in shards.items():
        safetensors.numpy.save_file(state, folder / name)
    places = {key: name for name, state in shards.items() for key in state}
    text = json.dumps({"weight_map": places if index is None else index})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards(tmp_path):
    one, two = {"a.weight": STATE["a.weight"]}, {"a.bias": STATE["a.bias"]}
    sharded(tmp_path, {"s-1.safetensors": one, "s-2.safetensors": two})
    equal(load_state_dict(tmp_path), one | two)
    equal(load_state_dict(tmp_path / "model.safetensors.index.json"), one | two)
    places = {"a.weight": "s-1.safetensors", "a.bias": "s-1.safetensors"}
    sharded(tmp_path, {}, places)
    with pytest.raises(ValueError, match=r"disagree in 1 tensors, such as a\.bias"):
        load_state_dict(tmp_path)
    (tmp_path / "s-2.safetensors").unlink()
    sharded(tmp_path, {}, places | {"a.bias": "s-2.safetensors"})
    with pytest.raises(ValueError, match=r"1 of the 2 shards .* not in .*: s-2\.safetensors"):
        load_state_dict(tmp_path)
    sharded(tmp_path, {}, {"a.bias": "model.safetensors.index.json"})  # itself, without end
    with pytest.raises(
        ValueError, match="names the index 'model.safetensors.index.json' as a shard"
    ):
        load_state_dict(tmp_path)
    sharded(tmp_path, {}, {"a.bias": "../s-1.safetensors"})
    with pytest.raises(ValueError, match="no file beside it"):
        load_state_dict(tmp_path)
    sharded(tmp_path, {}, {})
    with pytest.raises(ValueError, match="has no weight_map"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("ending", ["safetensors", "bin", "ckpt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>quota exceeded</html>", "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b'{"error": "not found"}', "is text, not weights"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_weights_file(ending, content, message, tmp_path):
    path = tmp_path / f"model.{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_state_dict(path)


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "s.safetensors"])
def test_every_truncation_is_an_error(name, tmp_path):
    path = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.numpy.save_file(STATE, path)
    else:
        path.write_bytes((FIXTURES / name).read_bytes())
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1, 61):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"(damaged|truncated).*again\.$"):
            load_state_dict(path)
    path.unlink()
    with pytest.raises(ValueError, match="there is no weights file"):
        load_state_dict(path)


def test_damage_inside_is_found_when_read(tmp_path):
    path = archive(tmp_path / "c.pt", {"": {"w": ("FloatStorage", RAMP)}})
    raw = bytearray(path.read_bytes())
    raw[raw.index(RAMP.tobytes()) + 9] ^= 1
    path.write_bytes(raw)
    state = load_state_dict(path)
    with pytest.raises(ValueError, match="damaged in archive/data/0 .*checksum"):
        np.asarray(state["w"])
    archive(path, {"": {"w": ("FloatStorage", RAMP)}}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed, which torch.save does not do"):
        load_state_dict(path)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    """Names and shapes come without the values, which then are no longer to be had."""
    for path in (
        archive(tmp_path / "c.pt", {"": {"w": ("FloatStorage", RAMP)}}),
        tmp_path / "c.safetensors",
    ):
        if path.suffix == ".safetensors":
            safetensors.numpy.save_file({"w": RAMP}, path)
        state = load_state_dict(path)
        path.unlink()
        assert state["w"].shape == (24,)
        with pytest.raises((OSError, ValueError)):
            np.asarray(state["w"])


def test_moving_averages_are_chosen_without_reading(tmp_path):
    """A checkpoint as LDM's: of both sets of weights only the chosen one is ever read."""
    names = (
        "model.a.w",
        "model_ema.aw",
        "model_ema.decay",
        "model_ema.num_updates",
        "scale_factor",
    )
    tensors = {name: ("FloatStorage", RAMP[i : i + 1]) for i, name in enumerate(names)}
    state = load_state_dict(archive(tmp_path / "model.ckpt", {"state_dict": tensors}))
    parts = take(with_moving_average(state), {"unet": "model."}, keep=("scale_factor",))
    assert all(isinstance(t, LazyTensor) for part in parts.values() for t in part.values())
    equal(parts["unet"], {"a.w": RAMP[1:2]})
    equal(parts[""], {"scale_factor": RAMP[4:5]})


def test_to_device_empties_the_tree():
    tree = {"a": {"kernel": RAMP.reshape(4, 6).T, "bias": RAMP[:2]}, "b": RAMP[:1]}
    leaves = {"a": dict(tree["a"]), "b": tree["b"]}
    moved = to_device(tree)
    assert tree == {}
    np.testing.assert_array_equal(moved["a"]["kernel"], leaves["a"]["kernel"])
    np.testing.assert_array_equal(moved["b"], leaves["b"])


def test_configs(tmp_path):
    with pytest.raises(ValueError, match=r"no .*config\.json: a model's folder"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match="damaged or no JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list where a JSON object belongs"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"act_fn": "silu"}')
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == {"act_fn": "silu"}


def test_a_dtype_that_is_not_read(tmp_path):
    header = json.dumps({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="stores w as C64, which is not read"):
        load_state_dict(path)


@pytest.mark.parametrize("dtype", ["int8", "bool", "uint16"])
def test_dtypes_of_safetensors(dtype, tmp_path):
    value = np.array([0, 1, 1], dtype)
    safetensors.numpy.save_file({"w": value}, tmp_path / "w.safetensors")
    equal(load_state_dict(tmp_path / "w.safetensors"), {"w": value})
