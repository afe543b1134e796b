"""matplotlib's SVG made part of a page: no namespaces, no fonts, no ids that clash, and colours that are the page's.

A chart is drawn in stand-in colours, one a role. Here each becomes a CSS variable, so that one picture serves a light
and a dark page.
"""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

__all__ = ["ROLES", "embedded"]

ROLES = {
    name: f"#0000{number:02x}"
    for number, name in enumerate(
        ("ink", "muted", "rule", "original", "c1", "c2", "c3", "c4", "c5"), start=0xE1
    )
}
"""Roles of colours, each with the stand-in that a chart is drawn in; the page defines a CSS variable a role."""

_VARIABLES = {colour: f"var(--{name})" for name, colour in ROLES.items()}
_HEX = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"#([A-Za-z][\w.-]*)")


def embedded(figure: Any, name: str, title: str) -> str:
    """The SVG element of a matplotlib figure.

    Args:
        figure: drawn in the colours of `ROLES` on a transparent ground.
        name: prefix of the ids, its own on the page.
        title: what a screen reader says.
    """
    name = re.sub(r"\W+", "-", name)
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    used = {
        match
        for element in root.iter()
        for value in element.attrib.values()
        for match in _REFERENCE.findall(value)
    }
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip() or None, None
        element.attrib = _attributes(element.attrib, used, name)
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: dict[str, str], used: set[str], name: str) -> dict[str, str]:
    """Attributes without namespaces and without ids that nothing refers to; colours by their variables."""
    kept = {}
    for key, value in attributes.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in used:
                kept[key] = f"{name}-{value}"
        elif key == "href" or value.startswith("url("):
            kept[key] = _REFERENCE.sub(rf"#{name}-\1", value)
        elif key == "style":
            kept[key] = _HEX.sub(lambda found: _VARIABLES[found[0]], _FONT.sub("", value))
        elif not (key == "transform" and value.startswith("rotate(-0 ")):
            kept[key] = value
    return kept
