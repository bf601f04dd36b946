"""Reading every byte of a checkpoint and comparing it with the digests that were kept of it: ``--verify``.

A converted directory has digests of all its files in its manifest, a run's checkpoint those that its processes wrote
after it was complete, a released directory those of ``SHA256SUMS`` or of the hub's cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsvl2_jax.checkpoint import digests
from dsvl2_jax.checkpoint.locate import MANIFEST_NAME, MODEL_NAME, RUN_NAME, check_sizes, kind, read_manifest, run_of
from dsvl2_jax.checkpoint.staging import write_text
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.json_files import read_json_object, read_text
from dsvl2_jax.runtime import processes

RUN_DIGESTS = "digests-{}.json"  # in a run's checkpoint, of each process

_AGAIN = "copy the checkpoint again, or convert it again"


def tell(directory: Path, notes: Iterable[str]) -> None:
    """Prints notes about a checkpoint on standard error, in the first process."""
    if processes.is_first():
        for note in notes:
            print(f"{directory}: note: {note}", file=sys.stderr, flush=True)


def verify(directory: Path) -> list[str]:
    """Compares all files with their digests.

    Args:
      directory: as `resolve` returns it, in any layout.

    Returns:
      A note that names the files without a digest, unless all have one.

    Raises:
      CheckpointError: files are missing or have changed; all are named.
    """
    layout = kind(directory)
    if layout == "orbax":
        expected = read_manifest(directory)["sha256"]
        digests.check(directory, expected, MANIFEST_NAME, _AGAIN)
        known = {*expected, MANIFEST_NAME} if expected else set()
        return _without(set(digests.files_below(directory)) - known, "convert again to have them")
    if layout == "run":
        return _verify_run(directory)
    known = set(digests.check_sums(directory)) | digests.check_hub_files(directory) | {digests.SUMS_NAME}
    return _without({file.name for file in directory.iterdir() if file.is_file()} - known, f"write {digests.SUMS_NAME}")


def _verify_run(directory: Path) -> list[str]:
    run = run_of(directory)
    model = read_json_object(run / RUN_NAME, CheckpointError, "Copy the run again.").get("model")
    model = {name: value for name, value in model.items() if isinstance(value, str)} if isinstance(model, dict) else {}
    digests.check(run / MODEL_NAME, model, f"{RUN_NAME} of the run", "copy the run again")
    documents = _documents(directory)
    expected = {name: value for document in documents.values() for name, value in document["sha256"].items()}
    digests.check(directory, expected, "digests of the checkpoint", way_out(directory))
    unknown = set(digests.files_below(directory)) - expected.keys() - documents.keys()
    unknown |= {f"../../{MODEL_NAME}/{name}" for name in set(digests.files_below(run / MODEL_NAME)) - model.keys()}
    return _without(unknown, "the run was stopped before they were written, or is an older one's")


def check_run_sizes(directory: Path) -> None:
    """Checks that the files of a run's checkpoint have the sizes that were kept of them, as far as any were.

    Raises:
      CheckpointError: files are missing or cut off, or what was kept has changed.
    """
    for document in _documents(directory).values():
        check_sizes(directory, document["files"], f"the checkpoint is damaged; {way_out(directory)}")


def way_out(directory: Path) -> str:
    """What to do about a damaged checkpoint of a run."""
    return f"copy it again, or remove {directory}: the run then resumes from the checkpoint before it"


def write_run_digests(directory: Path, index: int, count: int) -> None:
    """Keeps sizes and digests of the files of a complete checkpoint: the share of one of ``count`` processes.

    Raises:
      OSError: they cannot be read or written, perhaps because the checkpoint has been removed since.
    """
    files = digests.files_below(directory)
    mine = [name for name in files if not name.startswith("digests-")][index::count]
    content = {"files": {name: files[name] for name in mine}, "sha256": digests.of_files(directory, mine)}
    write_text(directory / RUN_DIGESTS.format(index), digests.sealed(content))


def _documents(directory: Path) -> dict[str, dict[str, Any]]:
    """File name → content of what `write_run_digests` wrote. Raises CheckpointError when it has changed since."""
    found = {}
    for path in sorted(directory.glob(RUN_DIGESTS.format("*"))):
        advice = "Remove it to do without, or copy the checkpoint again."
        content = read_json_object(path, CheckpointError, advice)
        digests.check_seal(path, read_text(path, CheckpointError, advice), advice)
        for key, kind_of_items in (("files", int), ("sha256", str)):
            value = content.get(key)
            if not isinstance(value, dict) or not all(isinstance(item, kind_of_items) for item in value.values()):
                raise CheckpointError(f"{path}: cannot be read ({key} is missing or of another kind). {advice}")
        found[path.name] = content
    return found


def _without(names: set[str], remedy: str) -> list[str]:
    """A note that there are files without a digest."""
    if not names:
        return []
    some = ", ".join(sorted(names)[:5])
    return [
        f"{len(names)} files have no digest and were not verified ({remedy}): {some}{' …' if len(names) > 5 else ''}"
    ]
