"""docs/serving.md and docs/grafana.json: what they tell is so."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from dsvl2_jax.apps.plan.slots import slots_that_fit
from dsvl2_jax.infer.serve.loop_lag import LoopLag
from dsvl2_jax.infer.serve.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, PREFIX, Metrics
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.released import released_config

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
SLOTS = re.findall(r"(\d+) MB in (small|base|tiny)", PAGE)
assert len(SLOTS) == 3
COMMANDS = [
    command
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for command in block.split("\n\n")
    if command.startswith("curl") and ADDRESS in command
]


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_curl_commands_work_as_they_stand(running, command):
    command = command.replace(ADDRESS, running.url).replace("curl ", "curl --silent --show-error --fail-with-body ")
    done = subprocess.run(["bash", "-euc", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["object"] in ("list", "chat.completion")
    if '"grounding": true' in command:
        assert answer["choices"][0]["boxes"]


def test_the_python_works_as_it_stands(running, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(block.replace(ADDRESS, running.url), "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def told():
    """The names of all metrics, without the prefix."""
    metrics = Metrics(["micro"], lambda: dict.fromkeys([*ENGINE_GAUGES, *ENGINE_COUNTERS], 0.0), LoopLag())
    metrics.request("/", 200)
    metrics.prompt("micro", 1, 1)
    metrics.first_token("micro", 1.0)
    metrics.answer("micro", "stop", 2, 1.0, {"queue": 0.1, "prefill": 0.1, "decode": 0.1})
    text = metrics.text().decode()
    return {name.removeprefix(PREFIX) for name in re.findall(r"^(dsvl2:\w+)", text, re.MULTILINE)}


def test_the_dashboard_asks_for_metrics_that_there_are(told):
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for target in targets for name in re.findall(rf"{PREFIX}(\w+)", target)}
    assert asked <= told
    assert {"num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_bucket"} <= asked


def test_the_page_lists_every_metric(told):
    names = {re.sub("_(bucket|count|sum|created)$", "", name) for name in told}
    assert all(f"`{name}" in PAGE for name in names), names


@pytest.mark.parametrize("megabytes, size", SLOTS)
def test_a_slot_takes_what_the_page_says(megabytes, size):
    config = Config.from_dict(released_config(size), size)
    sizes = {"data": 1, "tensor": 1, "expert": 1}
    report = slots_that_fit(config, sizes, itemsize=2, memory=141e9, stores=0)
    assert round(report.slot / 1e6) == int(megabytes)


def test_every_option_that_the_page_names_is_there():
    from dsvl2_jax.apps.bench.serve_options import ServeLoad
    from dsvl2_jax.apps.cli import serve

    fields = {*serve.Listening.__annotations__, *serve.Limits.__annotations__, *serve.Behaving.__annotations__}
    fields |= {*ServeLoad.__annotations__, "size", "layers", "directory"}  # of dsvl2 bench serve
    fields |= {"plan", "dtype", "cache_dtype", "context", "mesh", "processes", "coordinator", "process"}
    others = {"job", "topology", "worker", "command", "help", "silent"}  # of other commands
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", PAGE)}
    assert named - others <= fields, named - others - fields
