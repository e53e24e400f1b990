"""A page as a browser would find it."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Sections, what is referred to, what no box holds that scrolls, and tags left open."""

    VOID = ("meta", "img", "br", "link", "input", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.references: list[str] = []
        self.texts_instead: list[str] = []
        self.ids: list[str] = []
        self.cut_off: list[str] = []
        self.drawn_widths: list[int] = []
        self.open: list[str] = []
        self._classes: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.texts_instead.append(values.get("alt") or "")
        if values.get("role") == "img":
            self.texts_instead.append(values.get("aria-label") or "")
        if drawn := re.search(r"--drawn: (\d+)px", values.get("style") or ""):
            self.drawn_widths.append(int(drawn[1]))
        if (tag == "table" or drawn) and "scroll" not in self._classes:
            self.cut_off.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
            self._classes.append(values.get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open.pop() == tag
        self._classes.pop()


def check_self_contained(html: str, most: int = 2_000_000, *, scripts: int = 0) -> None:
    """Well formed, words for every image, nothing to fetch; tables and figures fit a phone or scroll in their own box.

    A page with scripts has so many, which stand in it, and may refer to its own parts.
    """
    page = Page(html)
    own = [reference for reference in page.references if scripts and reference.startswith("#")]
    others = [reference for reference in page.references if reference not in own]
    assert page.open == []
    assert page.references
    assert all(reference[1:] in page.ids for reference in own)
    assert all(reference.startswith("data:image/") for reference in others)
    assert all(page.texts_instead)
    assert html.count("<script") == scripts
    namespace = "http://www.w3.org/2000/svg"  # a name, which no browser fetches
    assert re.findall(r"https?://|@import|url\(|<link|fetch\(|XMLHttp", html.replace(namespace, "")) == []
    assert page.cut_off == []
    assert max(page.drawn_widths, default=0) * 0.66 <= 350
    assert len(html) < most


def table_rows(html: str, section: str) -> list[list[str]]:
    """The cells of every table in a section, row by row, as text."""
    part = html.partition(f'<section id="{section}">')[2].partition("</section>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>.*?</tr>", part)]
    return [[re.sub(r"<[^>]+>", " ", cell).strip() for cell in row] for row in cells]
