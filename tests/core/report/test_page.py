"""Building blocks of pages: escaping, tables, pictures and charts."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from core.report.page.html import Html, Section, columns, document, element, escape, folded, paragraph, picture, table
from core.report.page.svg import Frame, Line, bars, chart, matrix, nice_top

UNIT = (0.0, 1.0)


def test_text_is_escaped_once() -> None:
    assert escape("a < b & c") == "a &lt; b &amp; c"
    assert escape(escape("<")) == "&lt;"
    assert paragraph("<b>", Html("<b>bold</b>")) == "<p>&lt;b&gt;<b>bold</b></p>"
    assert element("a", "x", href='"><script>', class_="k", data_n=1) == (
        '<a href="&quot;&gt;&lt;script&gt;" class="k" data-n="1">x</a>'
    )
    assert element("div") == "<div></div>"
    assert element("br") == "<br/>"
    assert folded("<more>", paragraph("x")) == "<details><summary>&lt;more&gt;</summary><p>x</p></details>"
    assert columns(paragraph("x"), paragraph("y")).count("<div><p>") == 2


def test_a_table_formats_its_columns() -> None:
    """Counts have separators, scores three decimals, and what is not defined is a dash."""
    long = "a text that is longer than the others"
    shown = table(("name", "count", "score", "note"), [("cat", 12345, 0.5, long), ("dog", 0, -1.0, "")])
    assert re.findall(r"<td class=\"(\w+)\">(.*?)</td>", shown) == [
        *(("short", "cat"), ("number", "12,345"), ("number", "0.500"), ("long", long)),
        *(("short", "dog"), ("number", "0"), ("number", "–"), ("long", "")),  # noqa: RUF001
    ]
    assert table(("score",), [(float("nan"),), (None,)]).count("–") == 2  # noqa: RUF001


def test_a_picture_is_reduced_and_embedded() -> None:
    pixels = np.zeros((300, 1800, 3), np.uint8)
    pixels[:, 900:] = (250, 10, 10)
    figure = picture(pixels, "a <caption>", max_width=600)
    assert "<figcaption>a &lt;caption&gt;</figcaption>" in figure
    encoded = re.search(r'src="data:image/jpeg;base64,([^"]*)"', figure)
    assert encoded is not None
    image = Image.open(io.BytesIO(base64.b64decode(encoded[1])))
    assert (image.format, image.size) == ("JPEG", (600, 100))
    assert 'width="600" height="100"' in figure
    np.testing.assert_allclose(image.getpixel((500, 50)), (250, 10, 10), atol=12)


def test_a_frame_maps_data_to_the_chart() -> None:
    frame = Frame((0.0, 10.0), (0.0, 2.0), width=240, height=150, left=40, bottom=30, top=20, right=0)
    assert (frame.x(0), frame.x(5), frame.x(10)) == (40, 140, 240)
    assert (frame.y(0), frame.y(1), frame.y(2)) == (120, 70, 20)


def test_a_line_is_interrupted_where_it_is_not_finite_and_kept_inside() -> None:
    frame = Frame((0.0, 4.0), UNIT, width=140, height=140, left=20, bottom=20, top=20, right=20)
    y = [0.0, 0.5, float("nan"), 1.0, 7.0]
    drawn = chart("curve", [Line("precision", range(5), y, marked=True)], frame, "x", "y")
    path = re.search(r' d="([^"]*)"', drawn)
    assert path is not None
    assert path[1] == "M20 120L45 70M95 20L120 20"
    assert drawn.count("<circle") == 4
    assert "precision</span>" in drawn
    assert "precision</span>" not in chart("curve", [Line("precision", range(5), y)], frame, small=True)
    assert "<path" not in chart("empty", [Line("", [], [])], frame)


def test_bars_are_proportional() -> None:
    drawn = bars("gains", [("a", 0.2, "+0.2"), ("b", 0.1, "+0.1"), ("c", -1.0, "none")], 0.2)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths[0] == 2 * widths[1]
    assert widths[2] == 1  # visible, and not negative
    assert bars("nothing", [("a", 0.0, "0")], 0.0).count("<rect") == 1


def test_a_matrix_is_shaded_by_the_share_of_its_row() -> None:
    drawn = matrix(
        "confusion", np.array([[30, 10], [0, 123_456]]), ["cat", "a very long name of a class"], "true", "found"
    )
    assert re.findall(r"rgba\(var\(--heat\), ([\d.]+)\)", drawn) == ["0.51", "0.21", "0.66"]
    assert ">123k<" in drawn
    assert drawn.count("a very long nam…") == 2


@pytest.mark.parametrize("top, expected", [(0.93, 1), (1.2, 1.5), (0.04, 0.04), (730, 800), (0, 1), (float("nan"), 1)])
def test_round_numbers(top: float, expected: float) -> None:
    assert nice_top([0.0, top]) == pytest.approx(expected)
    assert nice_top([]) == 1


def test_a_document_has_its_sections_and_style() -> None:
    page = document("A <title>", "lead", [Section("first", "First & last", paragraph("text"))])
    assert page.startswith("<!DOCTYPE html>\n<html")
    assert "<title>A &lt;title&gt;</title>" in page
    assert '<a href="#first">First &amp; last</a>' in page
    assert '<section id="first"><h2>First &amp; last</h2><p>text</p></section>' in page
    assert "prefers-color-scheme: dark" in page
