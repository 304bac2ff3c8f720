"""Reading ONNX without the package that does it (with it: tests/live)."""

import sys

import pytest

from qdiff_jax.models.port.terrain import load_terrain
from qdiff_jax.runtime.onnx_files import load_onnx


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "a.onnx").write_bytes(b"")
    for read in (load_terrain, lambda path: load_onnx(path, {})):
        with pytest.raises(
            ValueError, match=r"a\.onnx is read by the package onnx, .* pip install"
        ):
            read(tmp_path / "a.onnx")
