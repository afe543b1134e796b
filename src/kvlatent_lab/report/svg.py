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
_REFERENCE = re.compile(r"(?<=#)([A-Za-z][\w.-]*)")


def embedded(figure: Any, name: str, title: str) -> str:
    """The SVG element of a matplotlib figure.

    Args:
        figure: drawn in the colours of `ROLES` on a transparent ground.
        name: prefix of the ids, its own on the page.
        title: what a screen reader says.
    """
    prefix = re.sub(r"\W+", "-", name)
    file = io.BytesIO()
    figure.savefig(
        file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    used = {
        one
        for element in root.iter()
        for value in element.attrib.values()
        for one in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip() or None, None
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib = {
            key: _rewritten(key, value, prefix)
            for key, value in attributes.items()
            if key != "id" or value in used
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _rewritten(key: str, value: str, prefix: str) -> str:
    """An attribute with ids under a prefix, or colours by their variables."""
    if key == "style":
        return _HEX.sub(lambda colour: _VARIABLES[colour[0]], _FONT.sub("", value))
    if key == "id":
        return f"{prefix}-{value}"
    return _REFERENCE.sub(rf"{prefix}-\1", value) if key == "href" or value.startswith("url(") else value
