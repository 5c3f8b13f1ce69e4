"""What the viewer writes: well-formed, complete, without outside resources, and the same for the same plan."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from xml.dom import minidom

import numpy as np
import pytest
from rich.console import Console

from nemo_rl.planview.difference import print_difference
from nemo_rl.planview.flow import flow_of
from nemo_rl.planview.html import render
from nemo_rl.planview.picture import draw
from nemo_rl.planview.png import encode
from nemo_rl.planview.text import print_view
from nemo_rl.planview.units import size

from .views import view_of


def page(view):
    text = render(view)
    return text, minidom.parseString(text.split("\n", 1)[1])  # raises where it is not well-formed


def tips(element):
    return [t.firstChild.data for t in element.getElementsByTagName("title") if t.parentNode.tagName != "head"]


def printed(show, *views) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(*views, console)
    return console.file.getvalue()


@pytest.mark.parametrize(("trainers", "generators"), [(2, 2), (1, 5), (16, 8)])
def test_every_rank_and_pair_is_drawn(trainers, generators):
    view = view_of(trainers, generators)
    text, document = page(view)
    ribbons, heat, bars = document.getElementsByTagName("svg")
    bands = [p for p in ribbons.getElementsByTagName("path") if p.getAttribute("class") == "band"]
    assert len(bands) == np.count_nonzero(view.matrix)
    assert len(heat.getElementsByTagName("rect")) == trainers * generators
    assert len(bars.getElementsByTagName("rect")) == trainers + generators
    assert f"trainer 0 · tp0 → generator 0 · tp0: {size(int(view.matrix[0, 0]))}" in tips(heat)
    for shown in (view.misc[0].reason, "frozen", "a note", "tp Shard(0)", "100 GB/s"):
        assert shown in text
    assert "rows &lt;" in text and "rows <" not in text


def test_the_page_stands_alone():
    text, document = page(view_of(64, 80, rows=320))
    assert not document.getElementsByTagName("script") and not document.getElementsByTagName("link")
    assert set(re.findall(r"https?://[^\"' )]+", text)) == {"http://www.w3.org/2000/svg"}
    assert all(i.getAttribute("src").startswith("data:") for i in document.getElementsByTagName("img"))
    assert "url(" not in text and "@import" not in text


def test_large_meshes_are_drawn_in_groups():
    view = view_of(256, 256, rows=256)
    text, document = page(view)
    assert len(text) < 1_000_000
    ribbons, heat, bars = document.getElementsByTagName("svg")
    assert len(ribbons.getElementsByTagName("g")) == 2 * 16
    assert len(heat.getElementsByTagName("rect")) == 32 * 32
    assert len(bars.getElementsByTagName("rect")) == 512
    (image,) = document.getElementsByTagName("img")
    pixels = decode(base64.b64decode(image.getAttribute("src").split(",", 1)[1]))
    assert pixels.shape == (256, 256, 4)
    assert np.array_equal(pixels[..., 3] > 0, view.matrix > 0)


def decode(data: bytes) -> np.ndarray:
    """The pixels of an RGBA file with unfiltered lines, every checksum checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        parts[kind] = body
        at += 12 + length
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 4 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 4)


def test_pixels_survive_the_file():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    assert np.array_equal(decode(encode(pixels)), pixels)
    with pytest.raises(ValueError, match="RGBA"):
        encode(pixels[..., :3])


def test_bands_fill_their_nodes_and_stay_inside():
    for shape in ((2, 3), (16, 4), (40, 24)):
        flow = flow_of(view_of(*shape, rows=240))
        for side, attribute, top in ((flow.trainers, "row", "left"), (flow.generators, "column", "right")):
            assert all(n.top >= 0 and n.top + n.height <= flow.height for n in side)
            assert all(a.top + a.height < b.top for a, b in zip(side, side[1:], strict=False))
            for index, node in enumerate(side):
                bands = [b for b in flow.bands if getattr(b, attribute) == index]
                assert sum(b.width for b in bands) == pytest.approx(node.height)
                spans = sorted((getattr(b, top), getattr(b, top) + b.width) for b in bands)
                assert spans[0][0] == pytest.approx(node.top)
                assert all(a[1] == pytest.approx(b[0]) for a, b in zip(spans, spans[1:], strict=False))


def test_one_view_gives_one_page():
    assert render(view_of(3, 2)) == render(view_of(3, 2))
    assert render(view_of(3, 2)) != render(view_of(2, 3))


def test_a_plan_without_bulk_is_drawn():
    view = view_of(2, 2, rows=0)
    text, _ = page(view)
    assert "No byte travels from shard to shard" in text
    assert "none: no bulk byte crosses a link" in printed(print_view, view)


def test_the_terminal_shows_all():
    view = view_of(2, 3)
    text = printed(print_view, view)
    for shown in (
        view.digest[:12],
        "bottleneck: trainer",
        "assumed: 100 GB/s",
        "1 · tp1",
        "bias",
        "frozen",
        "a note",
    ):
        assert shown in text
    assert "trainer 0 · tp0" in text and "generator 2 · tp2" in text


def test_a_difference_says_what_changed_and_nothing_else():
    a, b = view_of(2, 2), view_of(2, 2, rows=96)
    equal = printed(print_difference, a, view_of(2, 2))
    assert "one plan, byte for byte" in equal and "misc, unused, layouts and ranks are equal" in equal
    assert "%" not in equal
    text = printed(print_difference, a, b)
    assert "one plan" not in text and "bulk bytes" in text and "+100.0%" in text
    assert "trainer 1 (tp 1): 768 B -> 1.54 kB over the wire (+100.0%)" in text
    moved = printed(print_difference, a, view_of(2, 2, misc=False))
    assert "misc: 1 tensors, 12 B -> none: the loader computes b" in moved


def test_a_picture_is_written(tmp_path):
    draw(view_of(4, 3), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
