"""Several processes that run one command together: how they meet, agree, and end.

Every process runs the same programs, each on its own devices of one mesh; process 0 alone reads prompts and images,
writes results and prints. The first process that fails ends all of them, with one message and one exit status: it
leaves word at the coordination service of `jax.distributed`, where a thread of every process waits for it. A process
that was killed leaves no word; its heartbeat is missed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.messages import first_line, printable
from dsvl2_jax.runtime.ports import Ports
from dsvl2_jax.runtime.terminal import escaped

T = TypeVar("T")

_BEAT = 2.0  # seconds between two heartbeats
_DEAD = 20.0  # seconds without one after which a process is taken to have ended
# Seconds after which jax aborts the processes whose peers have ended: the last resort, as it prints a stack trace.
_ABORT = 45
_GRACE = 1.0  # seconds that process 0's message is waited for, where all may have failed in the same way
_LEAVING = 5.0  # seconds that processes wait for each other when they end
_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds: others may be slow, and what ends them ends the wait
_LEAST_BYTES = 1 << 16  # of a broadcast; sizes are powers of two, so that few programs are compiled
_FAILED, _ALIVE, _WAKE = "dsvl2/failed", "dsvl2/alive/", "dsvl2/wake/"
# What jax's errors say when a peer has gone in the middle of a collective.
_PEER_GONE = ("Gloo", "NCCL", "UNAVAILABLE", "onnection closed", "onnection reset", "heartbeat")


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process meets the others that run the same command; docs/pods.md has examples."""

    processes: str | None = None
    """number of processes that run the command together; auto: as many as Cloud TPU, GKE or SLURM have started."""
    coordinator: str | None = None
    """HOST:PORT where process 0 is met, the same for all."""
    process: int | None = None
    """which of the processes this is, from 0."""
    connect_timeout: int = 300
    """seconds until all processes must have met."""

    def join(self, arguments: Mapping[str, Any]) -> None:
        """Meets the other processes, before jax is used for anything else. Does nothing without ``processes``.

        Args:
          arguments: of the command; they must be the same everywhere.

        Raises:
          UsageError: options contradict each other, or the processes differ in arguments or version.
          DSVL2Error: not all of them came in time.
        """
        global _link
        count = self._count()
        if count == 1:
            return
        _standard_output_is_ours()
        _connect(self, count)
        _link = _Link()
        others = {name: value for name, value in arguments.items() if value is not self}
        same_everywhere("the program", _versions())
        same_everywhere("the command", ", ".join(f"{name}={value!s}" for name, value in others.items()))

    def _count(self) -> int | None:
        """The number of processes; 1: this one alone; None: jax finds out."""
        if self.processes is None:
            if self.coordinator is not None or self.process is not None:
                raise UsageError("--coordinator and --process need --processes N, the number of processes.")
            return 1
        if self.connect_timeout < 1:
            raise UsageError(f"--connect-timeout: found {self.connect_timeout}, expected a positive number of seconds.")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise UsageError(f"--coordinator: found {self.coordinator!r}, expected HOST:PORT, as in 10.0.0.1:8476.")
        if self.processes == "auto":
            return None
        if not self.processes.isdecimal() or int(self.processes) < 1:
            raise UsageError(f"--processes: found {self.processes!r}, expected a positive whole number, or auto.")
        count = int(self.processes)
        if count > 1 and (self.coordinator is None or self.process is None or not 0 <= self.process < count):
            raise UsageError(
                f"--processes {count} needs --coordinator HOST:PORT and --process I, from 0 to {count - 1}; found "
                f"{self.coordinator} and {self.process}."
            )
        return count


def joined() -> bool:
    """True when several processes run this command."""
    return _link is not None


def is_first() -> bool:
    """True for process 0, which reads, writes and prints for all; and without other processes."""
    import jax

    return jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in process 0, everywhere; the others do not call it. All processes must come here.

    The value travels pickled, over the devices: large arrays may be in it.
    """
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    if jax.process_count() == 1:
        return make()

    data = np.frombuffer(pickle.dumps(make()), np.uint8) if is_first() else np.empty(0, np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(max(_LEAST_BYTES, 1 << (size - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    return pickle.loads(np.asarray(broadcast_one_to_all(padded))[:size].tobytes())


def gather(value: str) -> list[str]:
    """The short texts of all processes, everywhere, after all of them have come here."""
    return [value] if _link is None else _link.gather(value)


def same_everywhere(what: str, value: str) -> None:
    """Raises UsageError, in all processes, unless all of them have the same value."""
    values = gather(value)
    if different := [i for i, its_value in enumerate(values) if its_value != values[0]]:
        raise UsageError(
            f"{what} must be the same in all processes; in process {different[0]} it is\n  {values[different[0]]}\n"
            f"and in process 0\n  {values[0]}\nStart all of them in the same way, from the same files."
        )


def decide(name: str, value: str | None) -> str | None:
    """The value with which any process first decided ``name``, or None as long as all came with None."""
    return value if _link is None else _link.decide(name, value)


def wake(number: int) -> None:
    """Called by process 0 to end the others' `wait_to_be_woken` of this number; numbers count up from 1."""
    if _link is not None:
        _link.client.key_value_set(f"{_WAKE}{number}", "")
        if number > 1:  # all have read it: they have made turns since
            _link.client.key_value_delete(f"{_WAKE}{number - 1}")


def wait_to_be_woken(number: int) -> None:
    """Waits for process 0, for any time, without keeping a device or a core busy."""
    if _link is not None:
        _link.client.blocking_key_value_get(f"{_WAKE}{number}", _FOREVER)


def end(status: int, message: str | None = None) -> int:
    """Ends the command in all processes: prints the message of the first failure, once.

    Returns:
      The exit status. After a failure among several processes it does not return.
    """
    global _link
    if _link is not None:
        link, _link = _link, None
        link.end(status, message)
    elif message is not None:
        print(printable(message), file=sys.stderr, flush=True)
        if _connecting:
            os._exit(status)  # python would wait for the thread that waits for the others
    return status


class _Link:
    """The connection to the coordination service, with a thread that waits for failures and one that beats."""

    def __init__(self) -> None:
        from jax._src import distributed  # jax.distributed does not lead to the service's keys and values

        state = distributed.global_state
        self.client, self.index, self.count = state.client, state.process_id, state.num_processes
        self.address = state.coordinator_address
        self._rounds = 0
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._beater = threading.Thread(target=self._beat, daemon=True)
        self._watcher.start()
        self._beater.start()

    def gather(self, value: str) -> list[str]:
        self._rounds += 1
        prefix = f"dsvl2/{self._rounds}/"
        self.client.key_value_set(f"{prefix}{self.index}", value)
        return [self.client.blocking_key_value_get(f"{prefix}{i}", _FOREVER) for i in range(self.count)]

    def decide(self, name: str, value: str | None) -> str | None:
        key = f"dsvl2/decided/{name}"
        if value is not None:
            with contextlib.suppress(Exception):  # another process was faster
                self.client.key_value_set(key, value)
        try:
            return self.client.key_value_try_get(key)
        except Exception:  # not decided
            return None

    def end(self, status: int, message: str | None) -> None:
        import jax

        if message is None:
            self.gather("done")  # the others may still have much to write, or fail
            self._ending.set()
            self._beater.join(_LEAVING)
            jax.distributed.shutdown()  # ends the watcher's waiting
            # A thread that came back from jax's client while Python ends would abort the process.
            self._watcher.join(_LEAVING)
            return
        gone = any(sign in message for sign in _PEER_GONE)
        # The watcher ends this process when another failure is reported. A process that notices a lost peer waits for
        # the missed heartbeat, which says which peer it was; one that may have failed like all others leaves the report
        # to process 0.
        self._watcher.join(_DEAD + 3 * _BEAT if gone else _GRACE if self.index else 0)
        self._leave_word(status, message)
        self._watcher.join(_LEAVING * 3)
        os._exit(status)

    def _leave_word(self, status: int, message: str, *, gone: bool = False) -> None:
        """``gone``: a process has ended that will not read this."""
        with contextlib.suppress(Exception):  # there is word already, or nobody to leave it with
            word = {"process": self.index, "status": status, "message": message, "gone": gone}
            self.client.key_value_set(_FAILED, json.dumps(word))

    def _watch(self) -> None:
        alone = False
        try:
            word = json.loads(self.client.blocking_key_value_get(_FAILED, _FOREVER))
        except Exception:
            alone = True
            text = f"dsvl2: error: process 0 ({self.address}) has ended or cannot be reached any more. {_AGAIN}"
            word = {"process": self.index, "status": 1, "message": text}
        if self._ending.is_set():
            return
        if alone or self.index == 0:
            by = f"error: process {word['process']}: " if word["process"] else "error: "
            print(printable(word["message"].replace("error: ", by, 1)), file=sys.stderr, flush=True)
        # jax aborts a process that loses the service, which is in process 0, and all of them when a barrier is missed.
        # Even after the barrier the others may take longer to end than process 0 does.
        if not word.get("gone") and not alone:
            with contextlib.suppress(Exception):  # some have ended before
                self.client.wait_at_barrier("dsvl2/left", int(_LEAVING * 1000))
        time.sleep(_GRACE if self.index == 0 else 0)
        os._exit(word["status"])

    def _beat(self) -> None:
        """Heartbeats; process 0 also listens to those of the others."""
        heard: dict[str, tuple[str, float]] = {}
        number = 0
        while not self._ending.wait(_BEAT if number else 0):
            number += 1
            with contextlib.suppress(Exception):  # the watcher sees to it
                self.client.key_value_set(f"{_ALIVE}{self.index}", str(number), allow_overwrite=True)
                beats = dict(self.client.key_value_dir_get(_ALIVE)) if self.index == 0 else {}
                now = time.monotonic()
                for key, beat in beats.items():
                    if heard.get(key, ("", 0))[0] != beat:
                        heard[key] = beat, now
                    elif now - heard[key][1] > _DEAD:
                        what = (
                            f"dsvl2: error: process {key.rpartition('/')[2]} of {self.count} has ended without a word"
                        )
                        self._leave_word(
                            1, f"{what} (killed, out of memory, or its machine is gone). {_AGAIN}", gone=True
                        )


_AGAIN = "Start the same command again; training resumes from its last complete checkpoint."

_link: _Link | None = None
_connecting = False


def _connect(options: Processes, count: int | None) -> None:
    """Calls `jax.distributed.initialize`, which aborts the process when it waits in vain, with a timeout of our own."""
    global _connecting
    import jax
    from jax._src import distributed

    ports = Ports.of(options.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # signals are ours
    problem: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                options.coordinator,
                count,
                options.process,
                initialization_timeout=options.connect_timeout + 60,
                heartbeat_timeout_seconds=_ABORT,
                coordinator_bind_address=ports.bind,
            )
            ports.place_collectives()
        except Exception as error:
            problem.append(error)

    _connecting = True
    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(options.connect_timeout)
    address = distributed.global_state.coordinator_address or options.coordinator
    if thread.is_alive():
        raise DSVL2Error(
            f"not all processes have met at {address} within {options.connect_timeout} seconds (--connect-timeout). "
            "See that all of them are started, that process 0 runs on this host, and that its port can be reached."
        )
    _connecting = False
    if not ports.is_local and not problem and distributed.global_state.process_id == 0:
        print(f"dsvl2: warning: {ports.warning(address)}", file=sys.stderr, flush=True)
    if problem:
        meeting = (
            f"at {address} "
            if address
            else "(jax finds no cluster here: give --processes N, --coordinator, --process) "
        )
        raise UsageError(
            f"--processes {options.processes}: the processes cannot meet {meeting}({first_line(problem[0])})."
        )


def _standard_output_is_ours() -> None:
    """Sends what libraries print on standard output, as gloo does, to standard error: it is no part of an answer."""
    sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        same = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        sys.stdout = escaped(same)
        os.dup2(2, 1)


def _versions() -> str:
    from importlib import metadata

    names = ("dsvl2-jax", "jax", "jaxlib", "flax", "orbax-checkpoint")
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)
