"""HTML of one self-contained page: elements, tables, pictures, sections and the document around them.

Text is escaped unless it is `Html`. Pages load nothing from anywhere: style, charts and pictures are inside.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

STYLE = Path(__file__).with_name("page.css")
MAX_UNBROKEN = 24  # characters of a table's cell that are kept on one line
_VOID = ("img", "meta", "link", "br", "rect", "line", "circle", "path", "polyline")  # elements without content


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Cell = str | float | int | None


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading and a link in the list of contents."""

    name: str  # its id in the page
    title: str
    content: Html


def escape(content: str | float | int) -> Html:
    """Return the content as HTML: text is escaped, `Html` unchanged."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def join(parts: Iterable[str | float | int]) -> Html:
    """Return the parts one after the other."""
    return Html("".join(map(escape, parts)))


def element(tag: str, *content: str | float | int, **attributes: str | float | int) -> Html:
    """Return an element. In names of attributes a trailing underscore is dropped and others become hyphens."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for name, value in attributes.items()
    )
    if tag in _VOID and not content:
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{join(content)}</{tag}>")


def paragraph(*content: str | float | int) -> Html:
    return element("p", *content)


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Html:
    """Return a table that scrolls sideways where it is too wide.

    A float is a score and has three decimals; None and negative scores, which are not defined, are a dash. Columns of
    numbers are aligned to the right.
    """
    body = list(rows)
    style = [_column_style([row[i] for row in body]) for i in range(len(header))]
    head = join(element("th", title, class_=name) for title, name in zip(header, style, strict=True))
    lines = [
        element("tr", *(element("td", _shown(value), class_=name) for value, name in zip(row, style, strict=True)))
        for row in body
    ]
    return element(
        "div",
        element("table", element("thead", element("tr", head)), element("tbody", *lines)),
        class_="wide",
    )


def _column_style(values: Sequence[Cell]) -> str:
    if any(not isinstance(value, str) for value in values):
        return "number"
    return "long" if any(len(value) > MAX_UNBROKEN for value in values if isinstance(value, str)) else "short"


def _shown(value: Cell) -> str:
    if value is None or (isinstance(value, float) and not value >= 0):
        return "–"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else value


def picture(pixels: np.ndarray, caption: str | Html, max_width: int = 900) -> Html:
    """Return a figure with an image (H, W, 3) uint8 RGB as JPEG, reduced to `max_width`."""
    image = Image.fromarray(pixels)
    if image.width > max_width:
        height = max(1, round(image.height * max_width / image.width))
        image = image.resize((max_width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82, optimize=True)
    source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    size = {"width": image.width, "height": image.height}
    alternative = html.unescape(caption)
    return element(
        "figure", element("img", src=source, alt=alternative, loading="lazy", **size), element("figcaption", caption)
    )


def gallery(figures: Iterable[Html], small: bool = False) -> Html:
    """Return figures side by side, as many as fit; `small` ones are charts of a few centimetres."""
    return element("div", *figures, class_="gallery small" if small else "gallery")


def columns(*parts: Html) -> Html:
    """Return parts beside each other where there is room for two, such as a chart and its table."""
    return element("div", *(element("div", part) for part in parts), class_="columns")


def folded(summary: str, content: Html) -> Html:
    """Return content that is shown after a click on its summary."""
    return element("details", element("summary", summary), content)


def document(title: str, lead: str | Html, sections: Sequence[Section]) -> str:
    """Return the complete page."""
    links = [element("a", section.title, href=f"#{section.name}") for section in sections]
    parts = [element("section", element("h2", section.title), section.content, id=section.name) for section in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),  # otherwise a browser asks for favicon.ico
        element("title", title),
        element("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    body = element(
        "body",
        element("header", element("h1", title), element("p", lead), element("nav", *links)),
        element("main", *parts),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"
