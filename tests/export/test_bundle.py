"""A bundle comes back bit for bit, or not at all and with everything that is wrong with it."""

import json
import pathlib
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qdiff_jax.export import bundle as bundle_file
from qdiff_jax.export.bundle import file_sha256, load_bundle, save_bundle, stored_bytes
from qdiff_jax.export.manifest import BundleError, sealed
from qdiff_jax.export.qtensor import QTensor, from_codes
from qdiff_jax.observe.taps import Tap
from qdiff_jax.quant.floating import nvfp4_qparams
from qdiff_jax.quant.qparams import from_tensor
from qdiff_jax.quant.quantizer import codes
from qdiff_jax.quant.rounding import SoftRounding
from qdiff_jax.quant.timed import TimeIndexed
from qdiff_jax.sites import SiteQuant
from qdiff_jax.stages.group_grids import weight_spec

from ..stages.chain import leaves_equal
from . import content

SIGNED = {"symmetric": True, "signed": True}

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def save(folder, **changes):
    made = {"params": content.params(), "quant": content.quant(), **content.CONFIGS, **changes}
    return save_bundle(folder, **made)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bundles") / "w4a8")


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def without_kernels():
    tree = content.params()
    del tree["down"]["conv"]["kernel"], tree["mid"]["proj"]["kernel"]
    return tree


def assert_is_content(loaded, more=()):
    quant = {**content.quant(), **dict(more)}
    for tree, expected in ((loaded.params, without_kernels()), (loaded.quant, quant)):
        # Equal structures mean equal names, specs, rules, shapes and bits.
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
            assert isinstance(leaf, jax.Array)
            assert leaf.dtype == wanted.dtype
            assert leaf.shape == wanted.shape
            assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()


def test_what_is_saved_comes_back_bit_for_bit(saved):
    loaded = load_bundle(saved)
    assert_is_content(loaded)
    for name in ("plan", "model", "schedule", "sampler", "source", "extra"):
        original = {k.removesuffix("_json").removesuffix("_config"): k for k in content.CONFIGS}
        assert loaded.manifest[name] == content.CONFIGS[original[name]]
    assert set(loaded.manifest["libraries"]) >= {"jax", "safetensors"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (saved, *saved.iterdir()))


@pytest.mark.parametrize(("version", "more"), [("v1", {}), ("v2", content.grouped())])
def test_bundles_of_every_format_version_keep_loading(version, more):
    assert_is_content(load_bundle(FIXTURES / version), more)


def test_what_follows_from_the_grid_is_not_stored_and_float16_scales_take_two_bytes(tmp_path):
    """And come back bit for bit; zero points of other grids, and scales that left the format, are stored."""
    kernel = np.random.default_rng(0).standard_normal((256, 128)).astype(np.float32)
    spec = weight_spec(64)
    grid = from_tensor(spec, jnp.asarray(kernel), -7, 7)
    weight = from_codes(np.asarray(codes(grid, kernel)), grid, 4)
    left = weight.replace(qparams=grid.replace(scale=grid.scale * jnp.float32(1.0001)))
    log = content.grid(0.5, 0.0, 0, 15, grid="log2")
    e2m1 = nvfp4_qparams(kernel[:32])
    table = jax.tree.map(
        lambda leaf: jnp.stack([leaf, leaf]), content.grid(1.0, 0.0, -8, 7, **SIGNED)
    )
    quant = {
        "a": {"in": SiteQuant(rhs=weight), "left": SiteQuant(rhs=left)},
        "b": {
            "log": SiteQuant(lhs=log, product=True),
            "fp4": SiteQuant(lhs=e2m1, product=True),
            "table": SiteQuant(lhs=TimeIndexed(table, jnp.asarray([1.0, 0.0])), product=True),
        },
    }
    folder = save(tmp_path / "b", params={"a": {}}, quant=quant)
    loaded = load_bundle(folder).quant
    assert leaves_equal(loaded, quant)
    tensors = load_bundle(folder).manifest["tensors"]
    assert not [name for name in tensors if name.endswith("zero_point")]
    assert tensors["quant/a/in/rhs/qparams/scale"]["dtype"] == "float16"
    assert tensors["quant/a/left/rhs/qparams/scale"]["dtype"] == "float32"
    ends = 8  # the smallest and the largest code
    held = save(tmp_path / "one", params={}, quant={"a": {"in": SiteQuant(rhs=weight)}})
    sizes = stored_bytes(held).by_kind
    assert sizes == {"codes": kernel.size // 2, "weight_grids": 2 * kernel.size // 64 + ends}
    assert 8 * weight.nbytes / kernel.size == 4.25


def test_kernels_held_as_codes_need_not_be_given(tmp_path):
    assert_is_content(load_bundle(save(tmp_path / "b", params=without_kernels())))
    tabled = content.quant()
    site = tabled["down"]["conv"]
    table = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), site.rhs)
    tabled["down"]["conv"] = site.replace(rhs=TimeIndexed(table, jnp.asarray([1.0, 0.0])))
    loaded = load_bundle(save(tmp_path / "tabled", quant=tabled))
    assert "kernel" not in loaded.params["down"]["conv"]
    assert jax.tree.structure(loaded.quant) == jax.tree.structure(tabled)


def test_a_site_that_only_simulates_keeps_its_kernel(tmp_path):
    quant = content.quant()
    site = quant["mid"]["proj"]
    quant["mid"]["proj"] = site.replace(rhs=site.rhs.qparams, execute=False)
    loaded = load_bundle(save(tmp_path / "b", quant=quant))
    assert np.array_equal(np.asarray(loaded.params["mid"]["proj"]["kernel"]), np.ones((3, 2)))


def test_the_tree_given_is_left_as_it_was(tmp_path):
    params = content.params()
    save(tmp_path / "b", params=params)
    assert "kernel" in params["down"]["conv"]


def test_stored_bytes_are_those_of_the_file(saved):
    sizes = stored_bytes(saved)
    tensors = safetensors.numpy.load_file(saved / "weights.safetensors")
    assert sizes.tensors == sum(t.nbytes for t in tensors.values())
    # conv: 2 rows of 2 bytes hold 3 x 2 codes of 4 bits; proj: 6 codes of 8 bits.
    assert sizes.by_kind["codes"] == 2 * 2 + 6
    assert sizes.by_kind["parameters"] == 4 * (2 + 2 + 2 + 3)
    weights = [leaf for leaf in jax.tree.leaves(
        content.quant(), is_leaf=lambda leaf: isinstance(leaf, QTensor)
    ) if isinstance(leaf, QTensor)]  # fmt: skip
    code_ranges = 2 * 4 * len(weights)
    assert sizes.by_kind["codes"] + sizes.by_kind["weight_grids"] == code_ranges + sum(
        weight.nbytes for weight in weights
    )
    assert sum(sizes.by_kind.values()) == sizes.tensors
    assert sizes.files == sum(path.stat().st_size for path in saved.iterdir())


def edit_tensors(folder, edit):
    path = folder / "weights.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_manifest(folder, edit, seal=True):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    if seal:
        manifest.pop("sha256", None)
    path.write_text(sealed(manifest) if seal else json.dumps(manifest))


def test_every_wrong_tensor_is_listed_in_one_error(copy):
    def damage(tensors):
        del tensors["params/out/kernel"]
        tensors["params/stray"] = np.zeros(1, np.float32)
        tensors["params/down/conv/bias"] = np.zeros(3, np.float32)
        tensors["quant/down/conv/rhs/data"] = tensors["quant/down/conv/rhs/data"].view(np.int8)
        tensors["quant/mid/proj/rhs/data"] = tensors["quant/mid/proj/rhs/data"] ^ 1

    edit_tensors(copy, damage)
    edit_manifest(copy, lambda m: m["sampler"].update(steps=50), seal=False)
    with pytest.raises(BundleError) as caught:
        load_bundle(copy)
    for told in (
        "params/out/kernel is missing",
        "params/stray is in weights.safetensors unlisted",
        "params/down/conv/bias is float32 (3,), expected float32 (2,)",
        "quant/down/conv/rhs/data is int8 (2, 2), expected uint8 (2, 2)",
        "quant/mid/proj/rhs/data has other values",
        "manifest.json was changed",
    ):
        assert told in str(caught.value)
    with pytest.raises(BundleError, match="list different tensors"):
        stored_bytes(copy)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(copy, kept):
    path = copy / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BundleError, match="weights.safetensors is missing or damaged"):
        load_bundle(copy)


def drop_scale(manifest):
    del manifest["trees"]["quant"]["dict"]["mid"]["dict"]["qk"]["fields"]["lhs"]["fields"]["scale"]


def misname_type(manifest):
    manifest["trees"]["quant"]["dict"]["mid"]["dict"]["qk"]["type"] = "Rotated"


def add_field(manifest):
    manifest["trees"]["quant"]["dict"]["mid"]["dict"]["qk"]["fields"]["colour"] = 1


def misstate_bits(manifest):
    manifest["trees"]["quant"]["dict"]["mid"]["dict"]["proj"]["fields"]["rhs"]["fields"]["bits"] = 4


def drop_block(manifest):
    del manifest["trees"]["params"]["dict"]["out"]


MISDESCRIBED = {
    "a QParams is described wrongly": drop_scale,
    "the type 'Rotated' is not known": misname_type,
    "SiteQuant has no field colour": add_field,
    "in 4 bits is stored as uint8": misstate_bits,
    "params/out/kernel belongs nowhere": drop_block,
}


@pytest.mark.parametrize("message", MISDESCRIBED)
def test_a_description_that_does_not_fit_is_refused(copy, message):
    edit_manifest(copy, MISDESCRIBED[message])
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


def test_unknown_versions_and_foreign_files_are_refused(copy, tmp_path):
    edit_manifest(copy, lambda m: m.update(version=3))
    with pytest.raises(BundleError, match="format version 3, this package reads 1, 2: upgrade"):
        load_bundle(copy)
    edit_manifest(copy, lambda m: m.update(version=1) or m.pop("plan"))
    with pytest.raises(BundleError, match="lacks plan"):
        load_bundle(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="damaged or describes no bundle"):
        load_bundle(copy)
    with pytest.raises(BundleError, match="holds no bundle"):
        load_bundle(tmp_path / "nowhere")


def test_an_existing_folder_is_not_touched(copy):
    before = sorted((path.name, path.read_bytes()) for path in copy.iterdir())
    with pytest.raises(BundleError, match="exists already"):
        save(copy)
    assert sorted((path.name, path.read_bytes()) for path in copy.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        patched.setattr(bundle_file.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(BundleError, match=r"needs [\d,]+ bytes and the disk has 10 free"):
            save(tmp_path / "b")
    # A write that really fails half way: no file may grow beyond a few hundred bytes.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(BundleError, match="could not be written .*nothing was left behind"):
            save(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_file, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def unfinished(**fields):
    quant = content.quant()
    quant["down"]["conv"] = SiteQuant(**fields)
    return {"quant": quant}


def test_unfinished_sites_are_refused_by_name(tmp_path):
    soft = SoftRounding(jnp.zeros((2,)), jnp.zeros((2,)), content.grid(1.0, 0.0, 0, 15))
    with pytest.raises(TypeError, match="quant/down/conv/rhs is a SoftRounding"):
        save(tmp_path / "b", **unfinished(rhs=soft))
    with pytest.raises(TypeError, match="quant/down/conv/tap is a Tap"):
        save(tmp_path / "b", **unfinished(tap=Tap()))
    with pytest.raises(TypeError, match="params/out/kernel is bfloat16"):
        save(tmp_path / "b", params={"out": {"kernel": jnp.ones((2,), jnp.bfloat16)}})


def test_params_of_another_model_and_incomplete_configs_are_refused(tmp_path):
    params = content.params()
    params["mid"]["proj"]["kernel"] = jnp.ones((2, 3))
    with pytest.raises(BundleError, match=r"mid/proj: the codes have shape \(3, 2\)"):
        save(tmp_path / "b", params=params)
    with pytest.raises(BundleError, match="model_config needs an entry 'family'"):
        save(tmp_path / "b", model_config={"channels": 3})
    with pytest.raises(BundleError, match="source needs an entry 'sha256'"):
        save(tmp_path / "b", source={"name": "mine"})
    with pytest.raises(BundleError, match="extra cannot be written as JSON"):
        save(tmp_path / "b", extra={"fid": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_file_sha256_is_the_standard_digest(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")
