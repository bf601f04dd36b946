"""/metrics, and the lag of the event loop that it tells."""

from __future__ import annotations

import asyncio
import time

from prometheus_client.parser import text_string_to_metric_families

from dsvl2_jax.infer.serve.loop_lag import LoopLag
from dsvl2_jax.infer.serve.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, PREFIX, Metrics


def samples(text):
    """Value of each sample, by its name without prefix and its labels but the model's."""
    out = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.startswith(PREFIX) and sample.labels.pop("model_name") == "micro"
            out[sample.name.removeprefix(PREFIX), *sorted(sample.labels.items())] = sample.value
    return out


def test_requests_are_counted(running):
    before = samples(running.http.get("/metrics").text)
    body = {"messages": [{"role": "user", "content": "Hello"}], "n": 2}
    usage = running.http.post("/v1/chat/completions", json=body).json()["usage"]
    running.http.post("/v1/chat/completions", json={})
    running.http.get("/no/such/path")
    after = samples(running.http.get("/metrics").text)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown["prompt_tokens_total",] == usage["prompt_tokens"]
    assert grown["generation_tokens_total",] == usage["completion_tokens"]
    assert grown["request_success_total", ("finished_reason", "stop")] == 2
    for name in ("e2e_request_latency", "time_to_first_token", "time_per_output_token"):
        assert grown[f"{name}_seconds_count",] == 2
    for phase in ("queue", "prefill", "decode"):
        assert grown[f"request_{phase}_time_seconds_count",] == 2
    chat = ("path", "/v1/chat/completions")
    assert grown["http_requests_total", chat, ("status", "200")] == 1
    assert grown["http_requests_total", chat, ("status", "400")] == 1
    assert grown["http_requests_total", ("path", "other"), ("status", "404")] == 1


def test_the_engines_statistics_are_told_by_the_names_that_dashboards_know():
    values = {name: float(i) for i, name in enumerate([*ENGINE_GAUGES, *ENGINE_COUNTERS])}
    told = samples(Metrics(["micro"], lambda: values, LoopLag()).text().decode())
    for name, value in values.items():
        assert told[name + ("_total" if name in ENGINE_COUNTERS else ""),] == value
    assert told["event_loop_lag_seconds",] == 0


def test_a_stall_of_the_loop_is_measured():
    async def stall():
        lag = LoopLag()
        watch = asyncio.create_task(lag.watch())
        await asyncio.sleep(0.05)
        time.sleep(0.2)
        await asyncio.sleep(0.05)
        watch.cancel()
        return lag

    lag = asyncio.run(stall())
    assert lag.longest >= 0.15 and lag.recent == lag.longest


def test_a_stall_is_forgotten_but_for_the_longest():
    lag = LoopLag()
    for now, late in ((0.0, 0.3), (1.0, 0.1), (2.0, 0.2), (14.0, 0.05)):
        lag.note(now, late)
    assert lag.recent == 0.3
    lag.note(15.5, 0.0)
    assert lag.recent == 0.2 and lag.longest == 0.3
    lag.note(40.0, 0.01)
    assert lag.recent == 0.01
    lag.forget()
    assert lag.recent == lag.longest == 0
