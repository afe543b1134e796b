"""Runs commands in a process of its own and prints, as its last line of stdout, what they did outside themselves.

Arguments: a JSON list of commands, each a list of words. What is printed: {"written": paths that Python opened to write,
made, moved or removed, "unpickled": classes that were unpickled, "connected": addresses}.
"""

import json
import os
import sys

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATHS = {
    "os.mkdir": 1,
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.link": 2,
    "os.truncate": 1,
}
seen = {"written": set(), "unpickled": set(), "connected": set()}


def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = set("wax+") & set(mode) if isinstance(mode, str) else bool((flags or 0) & _WRITES)
        if writes and isinstance(path, (str, bytes)):
            seen["written"].add(os.path.abspath(os.fsdecode(path)))
    elif event in _PATHS:
        if event in ("os.remove", "os.rmdir") and arguments[-1] not in (-1, None):
            return  # below a folder that is open: shutil.rmtree, whose own folder is seen
        paths = [one for one in arguments[: _PATHS[event]] if isinstance(one, (str, bytes, os.PathLike))]
        seen["written"].update(os.path.abspath(os.fsdecode(one)) for one in paths)
    elif event == "pickle.find_class":
        seen["unpickled"].add(".".join(arguments))
    elif event == "socket.connect":
        seen["connected"].add(str(arguments[1]))


sys.addaudithook(watch)
from typer.testing import CliRunner

from kvlatent_cli.main import app

for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words)
    if done.exit_code != 0:
        sys.exit(f"{words}\n{done.stdout}\n{done.stderr}\n{done.exception!r}")
print(json.dumps({name: sorted(values) for name, values in seen.items()}))
