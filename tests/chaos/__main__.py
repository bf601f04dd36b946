"""`make chaos`: kills and faults over every command that writes; exit status 1 when something that must hold does not.

python -m chaos --kills 200 --faults 2 --seed 0
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import quick_compilation

from chaos import campaign, faults, warm
from chaos.operations import OPERATIONS


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=2, help="rounds of every kind of fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="names of operations")
    parser.add_argument("--kinds", nargs="*", default=None, help="names of faults")
    options = parser.parse_args()
    if "CHAOS_FOLDER" not in os.environ:
        return _with_layer()
    folder, began = Path(os.environ["CHAOS_FOLDER"]), time.monotonic()
    layer = "LD_PRELOAD" in os.environ
    kinds = campaign.usable_faults(layer)
    if options.kinds is not None:
        kinds = [name for name in kinds if name in options.kinds]
    operations = [operation for operation in OPERATIONS if not options.only or operation.name in options.only]
    warm.warm_up()
    running = campaign.Campaign(folder, options.seed, layer)
    running.prepare(operations)
    for operation in operations:
        usual = running.undisturbed(operation)
        print(f"{operation.name}: {usual.seconds:.1f} s, {usual.calls} calls on files", flush=True)
    rounds = campaign.shares(options.kills, operations)
    for number, (operation, round_) in enumerate(rounds):
        if sum(running.kills.values()) >= options.kills:
            break
        running.kill(operation, round_)
        if number % 10 == 9:
            print(f"{sum(running.kills.values())} kills, {time.monotonic() - began:.0f} s", flush=True)
    for round_ in range(options.faults):
        for name in kinds:
            for operation in operations:
                if not operation.share and name not in campaign.SURROUNDINGS:
                    continue
                running.fault(operation, name, round_)
        print(f"{sum(running.faults.values())} faults, {time.monotonic() - began:.0f} s", flush=True)
    _print(running, time.monotonic() - began)
    if running.broken:
        print(f"\n{len(running.broken)} broken; SEED={options.seed} draws the same again:")
        print("\n".join(text.splitlines()[0] for text in running.broken))
    return 1 if running.broken else 0


def _with_layer() -> int:
    """Starts this program again with the fault layer, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="dsvl2-chaos-"))
    try:
        library = faults.build(folder)
        if library is None:
            print("no gcc: kills at random moments alone, without the faults of the disk and the clock", flush=True)
        environment = os.environ | {
            "CHAOS_FOLDER": str(folder),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XLA_FLAGS": quick_compilation.FLAGS,
            "HF_HUB_OFFLINE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "chaos", *sys.argv[1:]], environment)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _print(running: campaign.Campaign, seconds: float) -> None:
    print(f"\n{sum(running.kills.values())} kills")
    for (operation, phase), count in sorted(running.kills.items()):
        print(f"  {operation:<16} {phase:<28} {count:>4}")
    print(f"{sum(running.faults.values())} faults")
    for (operation, name, came_to), count in sorted(running.faults.items(), key=lambda item: item[0][1:]):
        print(f"  {name:<18} {operation:<16} {came_to:<24} {count:>4}")
    print(f"{len(running.broken)} broken, {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
