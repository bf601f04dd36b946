"""The `dsvl2` command: one subcommand per job. Heavy imports wait until a job needs them."""

from __future__ import annotations

import _thread
import contextlib
import io
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import tyro

from dsvl2_jax.apps.cli.bench import bench
from dsvl2_jax.apps.cli.checkpoints import convert, doctor, export, merge
from dsvl2_jax.apps.cli.data import data
from dsvl2_jax.apps.cli.evaluate import evaluate
from dsvl2_jax.apps.cli.generate import chat, generate
from dsvl2_jax.apps.cli.micro import demo, micro
from dsvl2_jax.apps.cli.plan import plan
from dsvl2_jax.apps.cli.serve import serve
from dsvl2_jax.apps.cli.train import plot, train
from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.terminal import with_escaped_output

COMMANDS = {
    "convert": convert,
    "export": export,
    "merge": merge,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "demo": demo,
    "train": train,
    "data": data,
    "plot": plot,
    "eval": evaluate,
    "plan": plan,
    "bench": bench,
    "micro": micro,
    "doctor": doctor,
}


# Options by their old names, which are errors that give the new ones.
_RENAMED = {"--exif": "--as-seen, which also covers transparency", "--candidates": "--max-tiles"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call."""
    args = list(sys.argv[1:] if argv is None else argv)
    _print_everything()
    debug = "--debug" in args
    if debug:
        args.remove("--debug")
    try:
        with _interrupts_kept():
            return _run(args)
    except SystemExit:
        if args[:1] == ["train"] and {"-h", "--help"} & set(args):  # tyro has printed the options
            from dsvl2_jax.train.settings.load import settings_help

            print(settings_help())
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
            if not processes.joined():
                raise
            traceback.print_exc()
        return processes.end(*_status_and_message(error))


def _run(args: list[str]) -> int:
    for option in args:
        if new := _RENAMED.get(option.partition("=")[0]):
            raise UsageError(f"{option}: this option is now called {new}.")
    status = tyro.extras.subcommand_cli_from_dict(
        {name: with_escaped_output(command) for name, command in COMMANDS.items()},
        prog="dsvl2",
        description="DeepSeek-VL2 in JAX. `dsvl2 COMMAND --help` explains a command; --debug shows tracebacks.",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )
    return processes.end(status or 0)


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Ctrl-C ends the command, too, when it falls into a function whose exceptions Python prints and forgets.

    Such are the callbacks of the garbage collector, of which jax has one.
    """
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.02, _thread.interrupt_main).start()  # once that function has ended
        else:
            show(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # after a read that failed, another hides what ends after it
            sys.unraisablehook = show


def _print_everything() -> None:
    """Escapes what the encoding of standard output cannot say, such as the special tokens where it is ASCII.

    Standard error does so already.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):  # it is closed, or has become something else
            sys.stdout.reconfigure(errors="backslashreplace")


def _status_and_message(error: BaseException) -> tuple[int, str | None]:
    """The exit status of an error, and what to say about it."""
    if isinstance(error, DSVL2Error):
        kind = "usage error" if isinstance(error, UsageError) else "error"
        return error.exit_status, f"dsvl2: {kind}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "dsvl2: interrupted"
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone.
        if processes.joined():
            return 1, "dsvl2: error: standard output is closed."
        sys.stderr.close()  # python would complain once more when it flushes at exit
        return 1, None
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        what = f"{where}: {error.strerror}" if where else f"a file cannot be read or written: {error.strerror}"
        return 1, f"dsvl2: error: {what}. Check the path, its permissions and the space on its disk."
    return 1, f"dsvl2: error: {type(error).__name__}: {str(error) or 'no message'} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
