"""What a reader finds in a report: listings by name, row and column, and everything that would leave the file."""

import re
from html.parser import HTMLParser
from typing import NamedTuple


class Entry(NamedTuple):
    """One entry of a listing: its text, and the number and error behind it."""

    text: str
    value: float | None
    error: float | None


class Page(HTMLParser):
    """Listings, ids, links and tags of a page."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.html, self.listings, self.ids, self.links, self.tags = html, {}, [], [], []
        self.figures, self.headings, self.text = [], [], ""
        self.table = self.row = self.cell = self.heading = None
        self.open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        self.links += [given[name] for name in ("href", "src", "xlink:href") if name in given]
        if tag == "figure":
            self.figures.append({"svg": 0, "table": 0, "cells": 0})
        elif self.figures and "figure" in self.open and tag in self.figures[-1]:
            self.figures[-1][tag] += tag != "svg" or given.get("role") == "img"
        if tag == "table":
            self.table = self.listings.setdefault(given["data-listing"], {})
        elif tag == "tr":
            self.row = given.get("data-row")
        elif tag == "td":
            number = [
                None if (raw := given.get(f"data-{name}")) is None else float(raw)
                for name in ("value", "error")
            ]
            self.cell = (given["data-column"], *number)
            self.seen = ""
        elif tag in ("h1", "h2"):
            self.heading = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes something else"
        if tag == "td":
            column, value, error = self.cell
            assert (self.row, column) not in self.table, "two entries under one name"
            self.table[self.row, column] = Entry(self.seen, value, error)
            self.figures[-1]["cells"] += 1 if "figure" in self.open else 0
            self.cell = None
        elif tag in ("h1", "h2"):
            self.headings.append(self.heading)
            self.heading = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.seen += data
        if self.heading is not None:
            self.heading += data

    def number(self, listing, row, column):
        return self.listings[listing][row, column].value

    def error(self, listing, row, column):
        return self.listings[listing][row, column].error

    def column(self, listing, column):
        """Numbers of a column, in order; None where there is none."""
        return [entry.value for (_, name), entry in self.listings[listing].items() if name == column]


def read_number(text):
    """The number that a reader takes from an entry, and how far rounding may have moved it."""
    found = re.match(r"(−?)([\d,]+)(?:\.(\d+))?(?: × 10\^(−?\d+))?", text)
    sign, whole, part, power = found.groups()
    scale = 10.0 ** int((power or "0").replace("−", "-")) * (0.01 if text.endswith("%") else 1.0)
    value = float(f"{whole.replace(',', '')}.{part or 0}") * (-1 if sign else 1)
    return value * scale, 0.5000001 * 10.0 ** -len(part or "") * scale
