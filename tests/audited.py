"""Runs commands of `dsvl2` in this process and prints what Python saw them do, as one JSON object a command.

python tests/audited.py '[["convert", "A", "B"], …]'

Python's own files that are opened to be read do not count, nor what is in memory alone. Native code is not seen: what
it leaves behind must be looked for on the disk, and its ports among the process's, which are listed here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn")
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")

events: dict[str, list[str]] = {}


def note(kind: str, what: object) -> None:
    seen = events.setdefault(kind, [])
    text = os.fsdecode(what) if isinstance(what, (str, bytes, os.PathLike)) else repr(what)
    if text not in seen:
        seen.append(text)


def hook(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and (arguments[2] or 0) & WRITING:
        note("written", os.path.abspath(os.fsdecode(arguments[0])))
    elif event in CHANGES:
        for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(path, (str, bytes, os.PathLike)):
                note("written", os.path.abspath(os.fsdecode(path)))
    elif event == "pickle.find_class":
        note("unpickled", ".".join(map(str, arguments)))
    elif event in PROGRAMS:
        note("started", arguments[:2])
    elif event in NETWORK:
        note("network", arguments[1:])


def listening() -> list[str]:
    """The TCP ports that this process listens at, as Linux lists them."""
    own = set()
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            own.add(os.readlink(f"/proc/self/fd/{handle}"))
    lines = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own]


def main() -> None:
    from dsvl2_jax.apps.cli.main import main as dsvl2

    sys.addaudithook(hook)
    for command in json.loads(sys.argv[1]):
        events.clear()
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = dsvl2(command)
        print(json.dumps({"status": status, "out": out.getvalue(), "ports": listening(), **events}), flush=True)


if __name__ == "__main__":
    main()
