"""Checkpoints of torch are read to the bit without torch, and nothing in them is run."""

import os
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from qdiff_jax.runtime.state_dicts import load_state_dict
from qdiff_jax.runtime.torch_files import load_torch
from qdiff_jax.runtime.torch_pickle import Unknown

FIXTURES = pathlib.Path(__file__).parents[1] / "parity" / "torch_files"
FORMATS = ("zip", "legacy")
RAMP = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_what_torch_wrote(name):
    found = load_torch(FIXTURES / f"{name}.pt")
    expected = {
        "transposed": RAMP.reshape(2, 3, 4).transpose(2, 0, 1),
        "sliced": RAMP.reshape(4, 6)[1:3, ::2],
        "same storage": RAMP[5:7],
        "expanded": np.full(5, 3, np.float32),
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "half": (RAMP / 8).astype(np.float16),
        "bfloat16": (RAMP / 8).reshape(4, 6).T,  # these values are exact in bfloat16
        "int64": np.arange(-3, 3),
        "uint8": np.arange(5, dtype=np.uint8),
        "uint16": np.arange(1, 5, dtype=np.uint16),
        "bool": np.array([True, False, True]),
        "complex64": (RAMP[:2] + 1j * RAMP[2:4]).astype(np.complex64),
        "parameter": RAMP[:4],
        "parameter with attribute": RAMP[:4],
    }
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value, err_msg=key, strict=True)
    state = found["state_dict"]
    assert type(state) is OrderedDict
    assert list(state)[:2] == ["0.weight", "0.bias"]
    np.testing.assert_array_equal(state["0.weight"], RAMP[:6].reshape(2, 3))
    assert state["1.num_batches_tracked"] == 0
    assert found["plain"] == [1, 2.5, None, "text", (True, b"bytes"), {3, 4}]
    assert found["size"] == (2, 3)
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("name", FORMATS)
def test_other_classes_are_records(name):
    args = load_torch(FIXTURES / f"{name}.pt")["args"]
    assert isinstance(args, Unknown)
    assert args.path == "argparse.Namespace"
    assert args.state == {"model": "DiT-XL/2", "lr": 1e-4}


@pytest.mark.parametrize("name", FORMATS)
def test_every_truncation_is_an_error(name, tmp_path):
    whole = (FIXTURES / f"{name}.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(1, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated.*again\.$"):
            load_torch(path)


def archive(path, pickled, storage=bytes(16)):
    """A checkpoint in the zip format with one storage, "0"; the same bytes at any time of day."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (("data.pkl", pickled), ("data/0", storage)):
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    return path


def legacy(path, pickled):
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(x, 2) for x in head) + pickled + pickle.dumps([], 2))
    return path


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_payload_does_not_run(write, protocol, tmp_path):
    marker = tmp_path / "ran"
    pickled = pickle.dumps({"weights": Payload(marker)}, protocol)
    found = load_torch(write(tmp_path / "evil.pt", pickled))
    assert not marker.exists()
    assert found["weights"].path.endswith(".system")
    assert found["weights"].args == (f"touch {marker}",)
    pickle.loads(pickled)
    assert marker.exists()  # the payload was live: the reader is what stopped it


def call(module, name, *arguments):
    """The opcodes of module.name(*arguments), each argument already opcodes."""
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(*values):
    return b"(" + b"".join(f"I{v}\n".encode() for v in values) + b"t"


def tensor(offset, size, stride, count=4, storage="FloatStorage", bits=b""):
    entry = f"(X\x07\0\0\0storagectorch\n{storage}\n".encode() + text("0") + text("cpu")
    entry += f"I{count}\ntQ".encode()
    place = (f"I{offset}\n".encode(), numbers(*size), numbers(*stride))
    return call("torch._utils", "_rebuild_tensor_v2", entry, *place, b"I00\n", b"N", bits)


def test_a_resolved_function_cannot_be_a_payload(tmp_path):
    """The one rebuild function that calls what the file names."""
    marker = tmp_path / "ran"
    arguments = b"(" + text(f"touch {marker}") + b"t"
    function = b"cos\nsystem\n"
    pickled = call("torch._tensor", "_rebuild_from_type_v2", function, b"N", arguments, b"N") + b"."
    found = load_torch(archive(tmp_path / "evil.pt", pickled))
    assert found.path == "os.system"
    assert not marker.exists()


def test_a_file_cannot_change_the_reader(tmp_path):
    """BUILD sets attributes of whatever is on the stack: here the defaults of a function."""
    state = b"(N}" + text("__defaults__") + numbers(7) + b"st"
    path = archive(tmp_path / "evil.pt", b"ctorch\nSize\n" + state + b"b.")
    with pytest.raises(ValueError, match="has no attribute"):
        load_torch(path)
    assert load_torch(archive(path, call("torch", "Size") + b".")) == ()


def test_tensors_stay_within_their_storage(tmp_path):
    values = np.arange(4, dtype=np.float32)
    path = tmp_path / "t.pt"
    good = load_torch(archive(path, tensor(1, (3,), (1,)) + b".", values.tobytes()))
    np.testing.assert_array_equal(good, values[1:])
    with pytest.raises(ValueError, match="read-only"):
        good[0] = 0
    bad = [(2, (3,), (1,)), (0, (2, 2), (3, 2)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2,), ())]
    for place in bad:
        with pytest.raises(ValueError, match="reaches beyond|impossible"):
            load_torch(archive(path, tensor(*place) + b".", values.tobytes()))
    with pytest.raises(ValueError, match="16 bytes where 5 x float32"):
        load_torch(archive(path, tensor(0, (5,), (1,), count=5) + b".", values.tobytes()))
    with pytest.raises(ValueError, match="torch.QInt8Storage are not supported"):
        load_torch(archive(path, tensor(0, (1,), (1,), storage="QInt8Storage") + b"."))


@pytest.mark.parametrize("later", [False, True])
def test_negation_and_conjugation_that_torch_left_undone(later, tmp_path):
    """The bits beside a tensor; those of another name are refused by it."""
    values = (RAMP[:4] + 1j).astype(np.complex64)
    for bits, expected in (
        ({"neg": True}, -values),
        ({"conj": True}, values.conj()),
        ({"neg": True, "conj": True}, -values.conj()),
        ({"neg": False}, values),
    ):
        state = b"}" + b"".join(
            text(k) + (b"I01\n" if v else b"I00\n") + b"s" for k, v in bits.items()
        )
        pickled = tensor(0, (4,), (1,), storage="ComplexFloatStorage", bits=state) + b"."
        found = load_torch(archive(tmp_path / "t.pt", pickled, values.tobytes()), later)
        np.testing.assert_array_equal(found.read() if later else found, expected, strict=True)
    other = tensor(0, (1,), (1,), bits=b"}" + text("upside down") + b"I01\ns") + b"."
    with pytest.raises(ValueError, match="tensors marked .upside down. are not supported"):
        load_torch(archive(tmp_path / "t.pt", other))


def test_what_is_whole_and_not_read_is_not_called_damaged(tmp_path):
    entry = b"(" + text("storage") + b"ctorch.storage\nUntypedStorage\n" + text("0") + text("cpu")
    place = (b"I0\n", numbers(4), numbers(1), b"I00\n", b"N", b"ctorch\nfloat8_e4m3fn\n")
    float8 = call("torch._utils", "_rebuild_tensor_v3", entry + b"I16\ntQ", *place) + b"."
    with pytest.raises(ValueError, match="tensors of torch.float8_e4m3fn are not supported") as e:
        load_torch(archive(tmp_path / "t.pt", float8))
    assert "again" not in str(e.value)
    # A whole module: sequences of pickles keep its source beside its class.
    module = b"(" + text("module") + b"cnets\nNet\n" + text("net.py") + text("code") + b"tQ)\x81."
    with pytest.raises(ValueError, match="holds a whole object of the class nets.Net, no state"):
        load_state_dict(legacy(tmp_path / "t.pt", b"\x80\x02" + module))


def test_a_pickle_cannot_ask_for_memory_by_a_number(tmp_path):
    """Ten bytes would take gigabytes."""
    for opcode in (b"r\xff\xff\xff\x07", b"p134217727\n"):
        for write in (archive, legacy):
            with pytest.raises(ValueError, match="impossible number 134217727"):
                load_torch(write(tmp_path / "t.pt", b"\x80\x02N" + opcode + b"."))


def test_flipped_bits_are_one_sentence(tmp_path):
    """Whatever zipfile and the operating system make of them."""
    path = archive(tmp_path / "t.pt", tensor(0, (4,), (1,)) + b".")
    whole, said = path.read_bytes(), []
    for place in range(len(whole)):
        flipped = bytes([whole[place] ^ (1 << place % 8)])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        try:
            np.asarray(load_torch(path, later=True).read())
        except ValueError as error:
            said.append(str(error))
    assert len(whole) / 2 < len(said) < len(whole)
    assert all(message.endswith("again.") for message in said)


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize("opcode", [rb"S'\S'", rb"c\S" + b"\nname"])
def test_odd_escapes_are_one_sentence(write, opcode, tmp_path, recwarn):
    """Python would warn of them while it reads the damaged file."""
    with pytest.raises(ValueError, match=r"again\.$"):
        load_torch(write(tmp_path / "t.pt", b"\x80\x02" + opcode + b"\n0."))
    assert not recwarn


def test_storages_of_the_other_byte_order(tmp_path):
    path = archive(
        tmp_path / "t.pt", tensor(0, (4,), (1,)) + b".", RAMP[:4].astype(">f4").tobytes()
    )
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    np.testing.assert_array_equal(load_torch(path), RAMP[:4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html>quota exceeded</html>", "web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"}}', "safetensors"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "tar format"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "web page"),
        ("<!DOCTYPE html>".encode("utf-16"), "web page"),
        ("<head>".encode("utf-16-le"), "web page"),
        (b"<!-- proxy --><script>", "web page"),
        (b"<title>Acc\xe8s refus\xe9", "web page"),
        (b"<Error><Code>AccessDenied</Code>", r"web page.* \('<Error><Code>AccessDenied</Code>'\)"),
        (b'{"error": {"code": 404}}', r"is text, not weights: it begins '\{\"error"),
        (b"Entry not found", "is text, not weights: it begins 'Entry not found'; if that"),
        ("Zugriff verweigert: ü".encode() * 40, r"begins 'Zugriff .*\.\.\.'; if"),
        (b"404", "is text, not weights"),
        (b"\x89PNG\r\n", "cannot be read as a torch checkpoint"),
        (pickle.dumps({"a": 1}), "cannot be read as a torch checkpoint"),
    ],
)
def test_other_files_are_named(content, message, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_torch(path)


def test_absent_and_torchscript(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint file"):
        load_torch(tmp_path / "none.pth")
    path = archive(tmp_path / "script.pt", b"N.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/constants.pkl", b"N.")
    with pytest.raises(ValueError, match="TorchScript.*; save the state dict"):
        load_torch(path)


def test_an_archive_of_other_files_says_what_it_has(tmp_path):
    with zipfile.ZipFile(tmp_path / "lsun.zip", "w") as file:
        file.writestr("model.ckpt", b"whatever")
    with pytest.raises(
        ValueError, match=r"archive of files \(model.ckpt\), .* give the file inside"
    ):
        load_torch(tmp_path / "lsun.zip")


@pytest.mark.parametrize("later", [False, True])
def test_parameters_as_objects_are_their_tensors(later, tmp_path):
    """torch before 0.4 saved them so: an object made of the tensor, with a state of its own."""
    made = b"ctorch.nn.parameter\nParameter\n(" + tensor(0, (4,), (1,)) + b"t%b(I01\nI00\nNtb"
    for how in (b"R", b"\x81"):  # called, and as `cls.__new__`
        pickled = b"\x80\x02}X\x01\0\0\0w" + made % how + b"s."
        found = load_torch(archive(tmp_path / "t.pt", pickled, RAMP[:4].tobytes()), later)["w"]
        np.testing.assert_array_equal(found.read() if later else found, RAMP[:4])
