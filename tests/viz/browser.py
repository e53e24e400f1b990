"""A page as a browser would find it."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Sections, what is referred to, and tags left open."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.references: list[str] = []
        self.texts_instead: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.texts_instead.append(values.get("alt") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_self_contained(html: str, most: int = 2_000_000) -> None:
    """Well formed, with words for every image, and nothing that a browser would have to fetch."""
    page = Page(html)
    assert page.open == []
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert all(page.texts_instead)
    assert re.findall(r"https?://|@import|url\(|<script|<link", html) == []
    assert len(html) < most
