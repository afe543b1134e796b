"""Licences of what an installation of kvlatent brings: `python tools/licences.py` lists them, and fails on one to look at.

Read off the metadata of the installed packages, so it needs no network. Extras are not followed unless named:
`python tools/licences.py serve eval`.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["find_licence", "installed_dependencies", "is_usable"]

_USABLE = re.compile(
    r"apache|\bmit\b|bsd|\bpsf\b|python software|\bisc|mpl|mozilla|unlicense|zlib|hpnd|cnri|public domain|boost"
    r"|lgpl|lesser general public",
    re.IGNORECASE,
)
"""Permissive, or of files and libraries that are used as they are (MPL, LGPL)."""

_REFUSED = re.compile(r"(?<!l)gpl|gnu general|affero|sspl|non-?commercial|proprietary", re.IGNORECASE)


def installed_dependencies(name: str, extras: Iterable[str] = ()) -> list[Distribution]:
    """`name`, and everything installed that it needs, by name. What is not installed is passed over."""
    waiting, found = deque([(name, frozenset(extras))]), {}
    seen = set()
    while waiting:
        name, wanted = waiting.popleft()
        key = canonicalize_name(name)
        if (key, wanted) in seen:
            continue
        seen.add((key, wanted))
        try:
            found[key] = distribution(name)
        except PackageNotFoundError:
            continue
        for line in found[key].requires or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                waiting.append((need.name, frozenset(need.extras)))
    return [found[key] for key in sorted(found)]


def find_licence(package: Distribution) -> str:
    """What a package says of its licence, shortest form first; "" where it says nothing."""
    said = package.metadata
    classified = [
        line.rpartition(" :: ")[2]
        for line in said.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    words = said.get("License-Expression") or " / ".join(classified) or said.get("License") or ""
    return words.strip().partition("\n")[0][:80]


def is_usable(licence: str) -> bool:
    """Whether a dependency of that licence may stand beside Apache-2.0 without a further thought."""
    return bool(_USABLE.search(licence)) and not _REFUSED.search(licence)


def main(extras: list[str]) -> int:
    """Print a line a package; 1 where one has to be looked at."""
    unclear = []
    for package in installed_dependencies("kvlatent", extras):
        licence = find_licence(package)
        if not is_usable(licence):
            unclear.append(package.name)
        print(f"{package.name:<28} {package.version:<18} {licence or 'not said'}")
    if unclear:
        print(f"to be looked at: {', '.join(unclear)}", file=sys.stderr)
    return 1 if unclear else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
