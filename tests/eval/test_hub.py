"""hub: names of files on the hub become paths; what cannot be fetched is one sentence."""

import builtins
import sys
import types

import pytest

from qdiff_jax.eval.backends import feature_network
from qdiff_jax.eval.hub import on_disk


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub: a folder `owner/repo` and the list of what was asked of it."""
    asked = []

    def path(repo, file):
        return tmp_path / repo / file

    def hf_hub_download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        if not path(repo_id, filename).is_file():
            raise KeyError(f"404 {filename}")
        return str(path(repo_id, filename))

    def file_exists(repo_id, filename, *, revision=None):
        return path(repo_id, filename).is_file()

    module = types.SimpleNamespace(hf_hub_download=hf_hub_download, file_exists=file_exists)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    (tmp_path / "owner" / "repo").mkdir(parents=True)
    return tmp_path / "owner" / "repo", asked


def test_a_path_stays_a_path(tmp_path, hub):
    assert on_disk(tmp_path / "x.pth") == tmp_path / "x.pth"
    assert str(on_disk("owner/repo/x.pth")) == "owner/repo/x.pth"
    assert hub[1] == []


def test_a_file_a_revision_and_a_folder(hub):
    folder, asked = hub
    for name in ("pytorch_model.bin", "vocab.json", "merges.txt"):
        (folder / name).write_text(name)
    (folder / "sub").mkdir()
    (folder / "sub" / "w.pth").write_text("w")
    assert on_disk("hub:owner/repo/sub/w.pth") == folder / "sub" / "w.pth"
    on_disk("hub:owner/repo@abc123/sub/w.pth")
    assert asked == [("owner/repo", "sub/w.pth", None), ("owner/repo", "sub/w.pth", "abc123")]
    names = ("model.safetensors", "pytorch_model.bin")
    assert on_disk("hub:owner/repo", any_of=names) == folder / "pytorch_model.bin"
    assert on_disk("hub:owner/repo", all_of=("vocab.json", "merges.txt")) == folder


def test_a_network_s_weights_come_from_the_hub(hub):
    folder, asked = hub
    (folder / "inception.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"inception\.pth"):
        feature_network("inception-fid", "hub:owner/repo/inception.pth")
    with pytest.raises(
        ValueError, match=r"has none of \['model.safetensors', 'pytorch_model.bin'\]"
    ):
        feature_network("clip-vit-b32", "hub:owner/repo")
    assert asked == [("owner/repo", "inception.pth", None)]


def test_what_cannot_be_fetched(hub, monkeypatch):
    with pytest.raises(ValueError, match=r"absent.pth cannot be fetched from the hub \(KeyError"):
        on_disk("hub:owner/repo/absent.pth")
    with pytest.raises(ValueError, match="names no file"):
        on_disk("hub:owner/repo")
    for wrong in ("hub:owner", "hub:/repo/x", "hub:owner/repo@/x"):
        with pytest.raises(ValueError, match="is no place on the hub"):
            on_disk(wrong)
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[hub\]'"):
        on_disk("hub:owner/repo/x.pth")
