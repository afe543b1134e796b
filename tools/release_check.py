"""What a release holds: `python tools/release_check.py dist` looks at wheel and sdist, and prints the wheel's listing.

`make release-check` builds them first, and then installs the wheel into an empty environment and runs the demo there.
"""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

__all__ = ["LARGEST_BYTES", "check_sdist", "check_wheel", "only_file"]

ROOT = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 10_000_000
_PACKAGES = ("kvlatent", "kvlatent_lab", "kvlatent_cli")
_SUFFIXES = (".py", ".typed", ".cpp", ".json", ".css", ".j2")
_ASSETS = "kvlatent/assets/"
_METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
_IN_SDIST = {
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "Makefile", "PKG-INFO", "README.md"),
    *("SECURITY.md", "benchmarks",
    "examples", "constraints.txt", "docs", "mkdocs.yml", "pyproject.toml", "recipes", "src", "tests", "tools"),
    ".gitignore",  # hatchling adds it
}  # fmt: skip


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of that kind.

    Raises:
        ValueError: none or several; an older version beside the new one would be uploaded as well.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder} must hold one {pattern}: got {len(found)}; empty it and build again")
    return found[0]


def check_wheel(path: Path) -> dict[str, int]:
    """Bytes by what a wheel carries: its packages, the embedded model, and metadata.

    Raises:
        ValueError: it carries something else, lacks what the demo needs, or is larger than `LARGEST_BYTES`.
    """
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        raise ValueError(
            f"a wheel is at most {LARGEST_BYTES:,} bytes: got {size:,} of {path.name}; leave out what it need not carry"
        )
    carried: Counter[str] = Counter()
    with zipfile.ZipFile(path) as wheel:
        for entry in wheel.infolist():
            carried[_part_of(entry.filename)] += entry.file_size
    for part in (*_PACKAGES, _ASSETS, "metadata"):
        if not carried[part]:
            raise ValueError(
                f"the wheel lacks {part}: {path.name} carries {', '.join(carried)}; see [tool.hatch] in pyproject.toml"
            )
    return dict(carried)


def _part_of(name: str) -> str:
    package, _, rest = name.partition("/")
    if name.startswith(_ASSETS):
        return _ASSETS
    if package in _PACKAGES and name.endswith(_SUFFIXES):
        return package
    if package.endswith(".dist-info") and rest in _METADATA:
        return "metadata"
    raise ValueError(
        f"a wheel carries modules and the embedded model only: got {name}; see [tool.hatch] in pyproject.toml"
    )


def check_sdist(path: Path) -> set[str]:
    """Names at the top of an sdist.

    Raises:
        ValueError: something is there that should not be, or something is missing.
    """
    with tarfile.open(path) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    if names != _IN_SDIST:
        raise ValueError(
            f"the sdist holds what a checkout needs to build and test: unexpected {sorted(names - _IN_SDIST)}, missing "
            f"{sorted(_IN_SDIST - names)}; see [tool.hatch] in pyproject.toml"
        )
    return names


def main(folder: Path) -> None:
    """Check both files, and print what the wheel carries."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    wheel, sdist = (
        only_file(folder, f"kvlatent-{version}-*.whl"),
        only_file(folder, f"kvlatent-{version}.tar.gz"),
    )
    for part, size in check_wheel(wheel).items():
        print(f"{size:>12,}  {part}")
    check_sdist(sdist)
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes; {sdist.name}: {sdist.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
