"""report: the schema, strict JSON, and pages that stand alone."""

import base64
import json
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qdiff_jax.eval import report

PROVENANCE = {
    "command": "python experiments/quantize.py --config=a.py:w4a8 <&>",
    "commit": "0123abc",
    "machine": "cpu",
    "jax_version": "0.10.2",
    "config_fingerprint": "f00",
    "source_checkpoint_hash": "sha256:00",
}
# The smallest PNG: one pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def variant(name="tfmq_w4a8", **changes):
    return {
        "name": name,
        "w_bits": 4,
        "a_bits": 8,
        "stored_bytes": 512,
        "eps_rel_mse": 0.00153,
        "rollout_mse": 0.0016,
        "psnr_db": 34.04,
        "feature_distance": 0.045,
        "temporal_cosine": 2.18e-4,
        "temporal_mismatch": 0.03,
        "calibrate_s": 12.34,
        "reconstruct_s": 612.3,
        "compile_s": None,
    } | changes


def full(**changes):
    sizes = {"w_bits": 32, "a_bits": 32, "stored_bytes": 2048, "reconstruct_s": None}
    return variant("fp32", **sizes) | report.reference_metrics() | changes


def written(tmp_path, variants=None, pictures=("Samples from the same noise",)):
    (tmp_path / "pictures").mkdir()
    paths = {}
    for index, caption in enumerate(pictures):
        paths[caption] = tmp_path / "pictures" / f"{index}.png"
        paths[caption].write_bytes(PNG)
    return report.write_report(tmp_path, variants or [full(), variant()], PROVENANCE, paths)


def test_json_round_trip(tmp_path):
    per_step = np.array([0.5, np.nan], np.float32)
    odd = variant(
        "diverged",
        w_bits=np.int64(4),
        eps_rel_mse=jnp.float32(0.25),
        rollout_mse=float("inf"),
        psnr_db=float("nan"),
        per_step={"eps": per_step},
    )
    paths = written(tmp_path, [full(psnr_db=float("inf")), variant(), odd])
    text = paths["json"].read_text("utf-8")
    assert not re.search(r"\b(NaN|Infinity)\b", text)
    document = report.read_report(paths["json"])
    assert document == json.loads(text)
    first, second, third = document["variants"]
    assert first["psnr_db"] is None
    assert first["nonfinite"] == {"psnr_db": "inf"}
    assert second == variant()
    assert third["eps_rel_mse"] == 0.25
    assert third["per_step"] == {"eps": [0.5, None]}
    assert third["nonfinite"] == {"rollout_mse": "inf", "psnr_db": "nan", "per_step.eps[1]": "nan"}
    assert document["provenance"] == PROVENANCE
    assert document["pictures"] == {"Samples from the same noise": "pictures/0.png"}


def test_the_cells_say_what_was_measured(tmp_path):
    broken = variant("broken", eps_rel_mse=float("nan"), stored_bytes=1024, feature_distance=None)
    lines = written(tmp_path, [full(), variant(), broken])["md"].read_text("utf-8").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    by_name = {
        name: [r[1:] for r in rows if r[0] == name] for name in ("fp32", "tfmq_w4a8", "broken")
    }
    assert by_name["fp32"][0] == ["32/32", "0", "0", "exact", "0", "0", "0.0"]
    assert by_name["tfmq_w4a8"][0] == [
        "4/8", "0.00153", "0.00160", "34.0", "0.0450", "2.18e-4", "3.0",
    ]  # fmt: skip
    assert by_name["tfmq_w4a8"][1] == ["4/8", "512 B", "4.00\u00d7", "12.3", "612", "\u2013"]
    assert by_name["broken"][0][1] == "diverged"
    assert by_name["broken"][0][4] == "\u2013"
    assert by_name["broken"][1][2] == "2.00\u00d7"


class Page(HTMLParser):
    """Collects what a page would load and whether its elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.sources += [v for k, v in named.items() if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html_stands_alone_and_is_escaped(tmp_path):
    text = written(tmp_path, [full(), variant("<b>&bold")])["html"].read_text("utf-8")
    parsed = Page()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    assert parsed.sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    assert "<b>&bold" in parsed.cells  # as text, not as markup
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_markdown_links_the_pictures_relatively(tmp_path):
    text = written(tmp_path)["md"].read_text("utf-8")
    assert "![Samples from the same noise](<pictures/0.png>)" in text
    assert str(tmp_path) not in text


def test_terminal_tables_fit_eighty_columns():
    variants = [full(), variant(), variant("brecq[red]_w4a8")]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report.terminal_table(variants))
        text = console.export_text()
    assert "\u2026" not in text  # rich's mark of a cell that was cut
    assert "brecq[red]_w4a8" in text
    for cell in ("exact", "2.18e-4", "4.00\u00d7", "612"):
        assert cell in text


@pytest.mark.parametrize("key", report.VARIANT_KEYS)
def test_a_missing_key_is_named(key):
    record = variant()
    del record[key]
    who = "variant number 1" if key == "name" else "'tfmq_w4a8'"
    with pytest.raises(ValueError, match=rf"{who} lacks \['{key}'\]"):
        report.check_variants([full(), record])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "needs a name"),
        ({"w_bits": "4"}, "w_bits of variant 'tfmq_w4a8' must be a number, got '4'"),
        ({"w_bits": None}, "w_bits .* must be a number"),
        ({"w_bits": True}, "w_bits .* must be a number"),
        ({"a_bits": 0}, r"a_bits .* is 0, outside \[1, 64\]"),
        ({"stored_bytes": 10.5}, "integer number of bytes"),
        ({"stored_bytes": float("inf")}, "stored_bytes .* got inf"),
        ({"rollout_mse": -1e-9}, "rollout_mse .* outside"),
        ({"temporal_mismatch": 3.0}, r"temporal_mismatch .* is 3.0, outside \[0, 1\]"),
        ({"eps_rel_mse": [0.1]}, r"eps_rel_mse .* must be a number, got \[0.1\]"),
    ],
)
def test_a_bad_value_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        report.check_variants([variant(**changes)])


def test_checking_twice_changes_nothing():
    once = report.check_variants([full(psnr_db=float("inf")), variant(rollout_mse=float("nan"))])
    assert report.check_variants(once) == once


def test_nothing_is_written_when_something_is_wrong(tmp_path):
    good = [full(), variant()]
    with pytest.raises(ValueError, match=r"repeated: \['fp32'\]"):
        report.write_report(tmp_path, [full(), full()], PROVENANCE, {})
    with pytest.raises(ValueError, match="different names"):
        report.write_report(tmp_path, [], PROVENANCE, {})
    with pytest.raises(ValueError, match="'fp32' is not among"):
        report.write_report(tmp_path, [variant()], PROVENANCE, {})
    origin = {k: v for k, v in PROVENANCE.items() if k != "commit"}
    with pytest.raises(ValueError, match=r"lacks \['commit'\]"):
        report.write_report(tmp_path, good, origin, {})
    with pytest.raises(ValueError, match="not finite"):
        report.write_report(tmp_path, good, PROVENANCE | {"lr": float("nan")}, {})
    with pytest.raises(TypeError, match=r"provenance.lr: .* cannot store a function"):
        report.write_report(tmp_path, good, PROVENANCE | {"lr": written}, {})
    with pytest.raises(FileNotFoundError, match="'Error'"):
        report.write_report(tmp_path, good, PROVENANCE, {"Error": tmp_path / "none.png"})
    assert list(tmp_path.iterdir()) == []


def test_read_report_refuses_what_is_not_strict_or_not_ours(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"format": 1, "variants": [NaN]}')
    with pytest.raises(ValueError, match="NaN, which is not JSON"):
        report.read_report(path)
    path.write_text('{"format": 99, "variants": []}')
    with pytest.raises(ValueError, match="format 99"):
        report.read_report(path)
