"""The code blocks of the documentation, read off its pages.

A block may have a comment before it: `<!-- not run: WHY -->` (its words are checked against the command line alone) or
`<!-- serves -->` (it is started, the blocks after it are its clients, and the next server or the end of the page ends it).
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|serves)(?:: (?P<why>[^\n]*?))? -->\n)?"
    r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """One fenced block: `mark` is "not run", "serves" or None."""

    language: str
    text: str
    mark: str | None
    why: str | None

    @property
    def lines(self) -> list[str]:
        """Commands of a shell block."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in map(str.strip, joined.splitlines()) if line and not line.startswith("#")]


def snippets_of(page: Path) -> list[Snippet]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Snippet(
            one["language"],
            re.sub(f"^{one['indent']}", "", one["text"], flags=re.MULTILINE),
            one["mark"],
            one["why"],
        )
        for one in _FENCE.finditer(text)
    ]
    fences = len(re.findall(r"^ *```", text, flags=re.MULTILINE))
    assert fences == 2 * len(found), f"{page.name}: {fences} fences and {len(found)} blocks"
    return found
