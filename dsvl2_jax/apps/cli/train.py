"""`dsvl2 train`, and `plot`, which draws what runs have logged.

Tested in tests/train/test_run.py and tests/train/log/test_plot.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import Together, flattened, needs_train_extra
from dsvl2_jax.runtime.processes import Processes

Overrides = Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")]]


def train(
    config: Positional[str],
    settings: Overrides = (),
    *,
    profile: str | None = None,
    tensorboard: bool = False,
    verify: bool = False,
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> None:
    """Train as a CONFIG.toml says, or resume the run in its directory after it was stopped or killed.

    Checkpoints, log and settings are in run.directory, which `generate`, `export` and `doctor` take as a checkpoint.
    Ctrl-C or SIGTERM finish the step and write a checkpoint; a second Ctrl-C stops at once.

    Args:
        config: a TOML file, or the name of a preset: {tiny,small,base}-{align,pretrain,sft}.
        settings: single settings instead of the file's, e.g. run.steps=100 optimizer.learning_rate=1e-5.
        profile: FIRST:LAST, the steps to trace into the run's directory (sets run.profile).
        tensorboard: write TensorBoard files as well (sets run.tensorboard).
        verify: read every file of the checkpoint that is started or resumed from, and compare it with its digest.
    """
    together.join(flattened(locals()))
    with needs_train_extra():
        from dsvl2_jax.train.run import train as run

        overrides = list(settings)
        if profile is not None:
            overrides.append(f"run.profile={profile}")
        if tensorboard:
            overrides.append("run.tensorboard=true")
        run(config, overrides, verify=verify)


def plot(runs: Positional[tuple[Path, ...]], *, out: Path = Path("plot.png")) -> None:
    """Draw loss, expert balance and throughput of one or several training runs.

    Args:
        runs: directories of runs (run.directory).
        out: PNG to write.
    """
    with needs_train_extra():
        from dsvl2_jax.train.log.plot import plot as run

        run(runs, out)
        print(out)
