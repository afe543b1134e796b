"""Look at the built site in a browser: every page in light, in dark and at 390 px, a picture each; fails where a page is too wide.

    make docs && pip install PySide6 && python tools/site_looks.py --out build/looks [--only PATTERN]

PySide6 brings a Chromium, and is needed here only. A page is too wide if the whole of it scrolls sideways; tables and
blocks of code may scroll for themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from fnmatch import fnmatch
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parent.parent / "build" / "site"
LOOKS = {"light": (1280, 900, "default"), "dark": (1280, 900, "slate"), "390": (390, 844, "default")}
_SETTLED = 600  # milliseconds until a page is drawn
_SCRIPT = "document.body.setAttribute('data-md-color-scheme', '{}'); document.documentElement.scrollWidth"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of a request."""


class Looker:
    """One window that shows page after page.

    Args:
        jobs: address, look and picture of each.
    """

    def __init__(self, jobs: list[tuple[str, str, Path]]) -> None:
        self.jobs, self.too_wide = jobs, []
        os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
        self.application = import_module("PySide6.QtWidgets").QApplication(["looks"])
        self.view = import_module("PySide6.QtWebEngineWidgets").QWebEngineView()
        self.core = import_module("PySide6.QtCore")
        self.view.loadFinished.connect(self._colour)

    def look(self) -> list[str]:
        """Show all; returns the pages that are too wide."""
        self._next()
        self.application.exec()
        return self.too_wide

    def _next(self) -> None:
        if not self.jobs:
            return self.application.quit()
        self.address, self.look_name, self.picture = self.jobs.pop(0)
        self.view.resize(*LOOKS[self.look_name][:2])
        self.view.show()
        return self.view.load(self.core.QUrl(self.address))

    def _colour(self, _loaded: bool) -> None:
        script = _SCRIPT.format(LOOKS[self.look_name][2])
        self.view.page().runJavaScript(script, self._measure)
        self.core.QTimer.singleShot(_SETTLED, self._keep)

    def _measure(self, width: float) -> None:
        if width > LOOKS[self.look_name][0]:
            self.too_wide.append(f"{self.picture.stem} takes {width:.0f} px of {LOOKS[self.look_name][0]}")

    def _keep(self) -> None:
        self.view.grab().save(str(self.picture))
        self._next()


def main() -> None:
    """Serve the site, look at it and say what is too wide."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="pages of these names, e.g. quality")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pages = {path.parent.relative_to(SITE).as_posix(): path for path in sorted(SITE.rglob("index.html"))}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    jobs = [
        (
            f"http://127.0.0.1:{server.server_port}/{name}/index.html",
            look,
            args.out / f"{name.replace('/', '-') if name != '.' else 'home'}-{look}.png",
        )
        for name in pages
        if fnmatch(name if name != "." else "home", args.only)
        for look in LOOKS
    ]
    count = len(jobs)
    if not jobs:
        sys.exit(f"error: {SITE} holds no page called {args.only!r}; make docs builds it")
    if too_wide := Looker(jobs).look():
        sys.exit("error: " + "; ".join(too_wide))
    print(f"{count} pictures in {args.out}, no page too wide")


if __name__ == "__main__":
    main()
