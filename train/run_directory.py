"""A training run on disk: what run it is, its checkpoints, and the lock that keeps a second process out.

``run.json`` says which model and data the run began with, ``config.toml`` with which settings, and
``model/`` holds the model's files. A checkpoint is a directory ``checkpoints/STEP``, which appears under that name
when it is complete: the parameters (or the adapter that is trained, in files of its own), the optimizer's state, and a
JSON document with the place in the data.

In an object store (`dsvl2_jax.checkpoint.remote`) a checkpoint has its name from the start, and is complete when
Orbax has written a file that says so. No lock is to be had there: ``claim`` says which process came last, and an
earlier one stops when it next saves. The log is written on the disk and sent to the store from time to time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import secrets
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich import filesize

from dsvl2_jax.checkpoint import orbax_io, remote
from dsvl2_jax.checkpoint.locate import CHECKPOINTS_NAME, MODEL_NAME, RUN_NAME, carry_files, run_steps
from dsvl2_jax.checkpoint.staging import NEW_SUFFIX, is_disk_full, locked, write_text
from dsvl2_jax.checkpoint.verify import RUN_DIGESTS, write_run_digests
from dsvl2_jax.errors import RunError
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.messages import changes, first_line, listed
from dsvl2_jax.model.parameter_paths import LeafPath
from dsvl2_jax.runtime import processes
from dsvl2_jax.train.log.run_log import LOG_NAME
from dsvl2_jax.train.settings.load import differences, load, to_toml
from dsvl2_jax.train.settings.schema import Settings

RUN_VERSION = 1
CONFIG_NAME = "config.toml"

_CLAIM = "claim"  # in a store: what the process wrote that opened the run last
_OPTIMIZER = "state"
_REMOVING = ".removing"  # added to a checkpoint's name before it is deleted, which takes a while
_MODEL_FILES = ("config.json", "processor_config.json", "*token*")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run began with, besides its settings."""

    model: Mapping[str, str]  # file name → hash, of `model_identity`
    data: Mapping[str, str]  # file → hash


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds besides the parameters."""

    optimizer: Any
    iterator: Mapping[str, Any]  # state of the data pipeline


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that has just become complete."""

    step: int
    seconds: float  # from the step to the complete checkpoint


@contextlib.contextmanager
def opened(directory: str | Path) -> Iterator[RunDirectory]:
    """The run directory, made when needed and held by this process alone, for all processes of the run.

    What a killed process left of unfinished checkpoints is removed. When the block is left, a checkpoint that is
    being written is finished first, except on Ctrl-C.

    Raises:
      CheckpointError: another process is training in the directory, or it cannot be made.
      RunError: it holds something else than a run.
    """
    path = remote.absolute(remote.path_of(directory))
    busy = f"{path}: another process is training in this directory. Wait for it, or choose another run.directory."
    with contextlib.ExitStack() as stack:
        run = RunDirectory(path)
        if processes.is_first() and remote.is_remote(path):
            run.claim()
            run.clean()
            stack.callback(run.send_logs)
        elif processes.is_first():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"run.directory {path}: cannot be made ({error.strerror}); choose another.") from error
            stack.enter_context(locked(path, busy))
            run.clean()
        try:
            yield run
        except KeyboardInterrupt:
            raise
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                run.wait()
            raise
        run.wait()
        run.wait_for_digests()


class RunDirectory:
    """A run's directory; see `opened`."""

    def __init__(self, path: Path):
        self.path = path
        self._saving: tuple[int, int, orbax_io.Saving] | None = None  # step, bytes, writing
        self._losses: dict[int, float] = {}
        self._digests: threading.Thread | None = None
        self._claim: str | None = None
        self._mirror = remote.Mirror(path) if remote.is_remote(path) else None

    @property
    def started(self) -> bool:
        """True when a run has begun in it."""
        if remote.is_remote(self.path):
            return RUN_NAME in remote.names(self.path)
        return (self.path / RUN_NAME).is_file()

    @property
    def logs(self) -> Path:
        """The directory on the disk where log, TensorBoard's files and profiles are written."""
        return self.path if self._mirror is None else self._mirror.directory

    def send_logs(self, *, now: bool = True) -> None:
        """Sends the logs to the store, if the run is in one and this process writes them: now, or once a minute."""
        if self._mirror is not None and processes.is_first():
            self._mirror.send(now=now)

    def claim(self) -> None:
        """Makes the run in a store this process's, whichever had it before, and fetches its log.

        Raises:
          CheckpointError: the store cannot be written or read.
        """
        self._claim = secrets.token_hex(16)
        with remote.reaching(self.path):
            (self.path / _CLAIM).write_text(self._claim)
        self._mirror.fetch(LOG_NAME)

    def _check_claim(self) -> None:
        """Raises RunError when another process has opened the run since."""
        if self._claim is None:
            return
        with remote.reaching(self.path, RunError):
            found = (self.path / _CLAIM).read_text()
        if found != self._claim:
            raise RunError(
                f"{self.path}: another process has begun to train in this directory, so this one stops and leaves it "
                "to that one. One process (or one group of processes) may train in a directory at a time."
            )

    @property
    def model(self) -> Path:
        """The directory of the model's configuration, processor and tokenizer files."""
        return self.path / MODEL_NAME

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return run_steps(self.path)

    def checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS_NAME / str(step)

    def clean(self) -> None:
        """Removes what a killed process left of unfinished and of half deleted checkpoints.

        Raises:
          RunError: the directory holds files, but no run.
        """
        known = {MODEL_NAME, CONFIG_NAME, CHECKPOINTS_NAME, RUN_NAME}
        if remote.is_remote(self.path):
            known |= {_CLAIM, LOG_NAME}
            found = remote.names(self.path)
        else:
            found = {file.name for file in self.path.iterdir()}
        foreign = sorted(name for name in found if name.split(".new")[0] not in known)
        if foreign and not self.started:
            raise RunError(
                f"run.directory {self.path}: not empty and no training run (it has {', '.join(foreign[:3])}"
                f"{' …' if len(foreign) > 3 else ''}). Choose a new directory."
            )
        self._remove_unfinished()
        if not remote.is_remote(self.path) and processes.is_first():
            for file in (self.path / CHECKPOINTS_NAME).glob(f"*/*{NEW_SUFFIX}"):
                file.unlink(missing_ok=True)

    def begin(self, settings: Settings, model_source: Path, identity: Identity) -> None:
        """Writes what identifies the run. Nothing counts before ``run.json``, which comes last."""
        if remote.is_remote(self.path):
            remote.remove(self.model)
        else:
            shutil.rmtree(self.model, ignore_errors=True)
            self.model.mkdir()
            (self.path / CHECKPOINTS_NAME).mkdir(exist_ok=True)
        content = {"version": RUN_VERSION, **dataclasses.asdict(identity)}
        with remote.reaching(self.path, RunError):
            carry_files(model_source, self.model)
            self.write_settings(settings)
            write_text(self.path / RUN_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def write_settings(self, settings: Settings) -> None:
        """Keeps the settings that are in force now."""
        with remote.reaching(self.path, RunError):
            write_text(self.path / CONFIG_NAME, to_toml(settings))

    def check(self, settings: Settings, identity: Identity) -> None:
        """Refuses to resume another run than the one that began here.

        Raises:
          RunError: settings, model or data files are not those of the start; all of them are listed.
        """
        before = self._identity()
        other = [
            *differences(load(remote.local_file(self.path / CONFIG_NAME), accept_old_names=True), settings),
            *changes(before.model, identity.model, "model: ", values=False),
        ]
        if other:
            raise RunError(
                f"{self.path}: holds another run than the one asked for:\n{listed(other)}\n"
                f"To resume it, use its settings ({CONFIG_NAME} in it has them all); for a new run choose another "
                "run.directory."
            )
        if changed := list(changes(before.data, identity.data, values=False)):
            raise RunError(
                f"{self.path}: the data is not that of the run's start, so the run cannot resume exactly:\n"
                f"{listed(changed)}\n"
                "Put the files back, or the function's code, to resume; or start a new run from its newest checkpoint: "
                f"another run.directory, with model.checkpoint={self.path}."
            )

    def _identity(self) -> Identity:
        path = self.path / RUN_NAME
        content = read_json_object(path, RunError, "Choose another run.directory.")
        try:
            version = content.pop("version")
            content.pop("layout", None)  # of processes and rows, which may change now
            if version == RUN_VERSION:
                return Identity(**content)
        except (KeyError, TypeError) as error:
            raise RunError(f"{path}: cannot be read ({error}). Choose another run.directory.") from None
        raise RunError(
            f"{path}: written in version {version!r} of the layout, this program reads {RUN_VERSION}. Choose another "
            "run.directory."
        )

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        optimizer: Any,
        iterator: Mapping[str, Any],
        *,
        validation_loss: float | None = None,
        entries: Mapping[LeafPath, int] | None = None,
    ) -> None:
        """Begins to write the checkpoint of ``step``, after the one before is complete.

        Args:
          step: updates done.
          trees: of the trainer's `contents`. All arrays may be donated afterwards.
          optimizer: its state, any pytree of arrays.
          iterator: the data pipeline's state, JSON.
          validation_loss: measured at this step, to know the best checkpoint.
          entries: of `orbax_io.ParamWriter`.

        Raises:
          RunError: the disk has not room enough, or the checkpoint before could not be written.
        """
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((trees, optimizer)))
        self._check_claim()
        if not remote.is_remote(self.path) and shutil.disk_usage(self.path).free < size:
            raise self._disk_full(step, size)
        document = {"step": step, "iterator": iterator, "validation_loss": validation_loss}
        try:
            writing = orbax_io.Saving(self.checkpoint(step), {**trees, _OPTIMIZER: optimizer}, document, entries)
        except Exception as error:
            raise self._failed(step, size, error) from error
        self._saving = step, size, writing

    def poll(self) -> Saved | None:
        """The checkpoint that has become complete since the last call. Raises RunError when it could not be written."""
        self.send_logs(now=False)
        return self._finished(wait=False)

    def wait(self) -> Saved | None:
        """As `poll`, after waiting for the checkpoint that is being written."""
        return self._finished(wait=True)

    def _finished(self, *, wait: bool) -> Saved | None:
        if self._saving is None:
            return None
        step, size, writing = self._saving
        try:
            if wait:
                writing.wait()
            elif not writing.done():
                return None
        except Exception as error:
            self._saving = None
            raise self._failed(step, size, error) from error
        self._saving = None
        if not remote.is_remote(self.path):  # a store has checksums of its own, and reading all again takes as long
            self._keep_digests(step)
        self.send_logs()
        return Saved(step, writing.seconds)

    def _keep_digests(self, step: int) -> None:
        """Begins to read what has been written, each process its share, for the digests; steps do not wait for it."""
        self.wait_for_digests()
        share = self.checkpoint(step), jax.process_index(), jax.process_count()

        def write() -> None:
            with contextlib.suppress(OSError):  # pruned meanwhile, or a full disk: the checkpoint is complete without
                write_run_digests(*share)

        # A daemon, as a process that is told to stop need not wait: the checkpoint counts without digests.
        self._digests = threading.Thread(target=write, name="dsvl2-digest", daemon=True)
        self._digests.start()

    def wait_for_digests(self) -> None:
        """Returns when the newest complete checkpoint has its digests."""
        if self._digests is not None:
            self._digests.join()
            self._digests = None

    def prune(self, keep_last: int) -> None:
        """Deletes all checkpoints but the newest ``keep_last`` and the one of least validation loss."""
        steps = self.steps()
        losses = {step: self._validation_loss(step) for step in steps}
        best = min(losses, key=lambda step: (losses[step], -step), default=0)
        for step in steps[:-keep_last]:
            if processes.is_first() and (step != best or math.isinf(losses[step])):
                if remote.is_remote(self.path):
                    orbax_io.remove(self.checkpoint(step))
                    continue
                doomed = self.checkpoint(step).with_name(f"{step}{_REMOVING}")
                self.checkpoint(step).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)  # a digest may be written into it at this moment
                if doomed.exists():
                    shutil.rmtree(doomed)

    def _validation_loss(self, step: int) -> float:
        """Infinite for a checkpoint that has none; one that cannot be read is not worth keeping either."""
        if step not in self._losses:
            loss = None
            with contextlib.suppress(Exception):
                loss = orbax_io.read_documents(self.checkpoint(step))[0]["validation_loss"]
            self._losses[step] = math.inf if loss is None or math.isnan(loss) else loss
        return self._losses[step]

    def restore(self, step: int, optimizer: Any) -> Restored:
        """Optimizer and place in the data of a checkpoint; `load_params` reads its parameters.

        Args:
          optimizer: tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          RunError: the checkpoint is damaged or of another layout.
        """
        path = self.checkpoint(step)
        try:
            iterators = [document["iterator"] for document in orbax_io.read_documents(path)]
            together: dict[str, Any] = {}
            for iterator in iterators:
                together |= iterator.get("streams", {})
            iterator = {"streams": together} if together else iterators[0]
            restored = Restored(orbax_io.read_tree(path, _OPTIMIZER, optimizer), iterator)
        except Exception as error:  # Orbax and tensorstore raise ValueError, KeyError, OSError, XlaRuntimeError …
            raise RunError(
                f"{path}: cannot be read ({first_line(error)}). Remove this directory to resume from the checkpoint "
                "before it."
            ) from error
        # A kill came before they were written.
        if not remote.is_remote(path) and not (path / RUN_DIGESTS.format(jax.process_index())).is_file():
            self._keep_digests(step)
        return restored

    def _failed(self, step: int, size: int, error: BaseException) -> RunError:
        self._remove_unfinished()
        if not remote.is_remote(self.path) and is_disk_full(error):
            return self._disk_full(step, size)
        return RunError(f"{self.checkpoint(step)}: cannot be written ({first_line(error)}). {self._what_is_left()}")

    def _disk_full(self, step: int, size: int) -> RunError:
        free = shutil.disk_usage(self.path).free
        return RunError(
            f"{self.checkpoint(step)}: the disk is too full for this checkpoint: {filesize.decimal(size)} are needed, "
            f"{filesize.decimal(free)} are free. {self._what_is_left()}"
        )

    def _what_is_left(self) -> str:
        if steps := self.steps():
            return (
                f"The last complete checkpoint, of step {steps[-1]}, is untouched; mend the cause and start the same "
                "command again: it resumes from there."
            )
        return "There is no earlier checkpoint; mend the cause and start the same command again."

    def _remove_unfinished(self) -> None:
        directory = self.path / CHECKPOINTS_NAME
        if remote.is_remote(self.path):
            for path in orbax_io.unfinished(directory) if processes.is_first() else ():
                orbax_io.remove(path)
            return
        if processes.is_first() and directory.is_dir():
            for path in (*orbax_io.unfinished(directory), *directory.glob(f"*{_REMOVING}")):
                shutil.rmtree(path, ignore_errors=True)
                if path.exists():
                    print(f"{path}: unfinished, and cannot be removed", file=sys.stderr)


def model_identity(directory: Path) -> dict[str, str]:
    """File name → hash of the files that say what the model is, its weights apart."""
    files = sorted({file for pattern in _MODEL_FILES for file in directory.glob(pattern) if file.is_file()})
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
