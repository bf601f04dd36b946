"""The measurements of `dsvl2 bench serve`, each against one running server; the soak has a module of its own.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import asyncio
import time

from dsvl2_jax.apps.bench.serve_client import CHAT, COMPLETIONS, Reply
from dsvl2_jax.apps.bench.serve_figures import middle, p95
from dsvl2_jax.apps.bench.serve_load import Load, rounds, together
from dsvl2_jax.apps.bench.serve_requests import ask, chat, fixed_length, png_url, streamed, url

_MANY_TIMES = 6.0  # the throughput of many clients over that of one
_LAG = 50.0  # milliseconds
_SECOND_TURN = 0.2  # of the first turn
_MARGIN = 1.2  # over one chunk and one group
_WINDOW = 15.0  # seconds that the gauge of the loop's lag looks back


async def throughput(load: Load) -> None:
    """Output tokens per second of each number of clients."""
    runs = [await load.closed_loop(clients) for clients in load.options.clients]
    series = load.findings.series
    for run in runs:
        label = f"{run.clients} client{'s' * (run.clients > 1)}"
        load.findings.add("throughput", f"{label}: output tokens/s", run.tokens_per_second, "tokens/s")
        load.findings.add("throughput", f"{label}: requests/s", run.requests_per_second, "/s")
        load.findings.add("throughput", f"{label}: time to first token, p95", milliseconds(run.first_tokens), "ms")
        load.findings.add("throughput", f"{label}: time per output token, p95", milliseconds(run.per_token), "ms")
    series["clients"] = [run.clients for run in runs]
    series["tokens/s"] = [run.tokens_per_second for run in runs]
    if len(runs) > 1 and (one := runs[0].tokens_per_second):
        what = f"tokens/s of {runs[-1].clients} clients over {runs[0].clients}"
        aim = _MANY_TIMES if (runs[0].clients, runs[-1].clients) == (1, 32) else None
        load.findings.add("throughput", what, runs[-1].tokens_per_second / one, "×", aim=aim, at_least=True)


async def half_load(load: Load) -> None:
    """Time to first token when half as many requests come as the server can answer, at random times."""
    rate = (await load.closed_loop(load.options.most_clients)).requests_per_second / 2
    parts = await load.chunk_seconds(last=False) + await load.group_seconds(long=False)
    kinds = [
        kind
        for kind, share in (("text", 1 - load.options.picture_share), ("picture", load.options.picture_share))
        if share
    ]
    own = {kind: await load.own_seconds(kind) for kind in kinds}
    allowed = {kind: 2 * own[kind] + parts for kind in kinds}
    replies: dict[str, list[Reply]] = {kind: [] for kind in kinds}

    async def one(kind: str, body: bytes) -> None:
        replies[kind].append(load.expect(await load.client.stream(CHAT, body)))

    mixed, random = load.mixed(), load.requests.rng
    count = max(10, round(3 * load.options.seconds * rate))
    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for kind, body in (next(mixed) for _ in range(count)):
            due += random.exponential(1 / rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(kind, streamed(body)))
    shares = []
    for kind in kinds:
        seconds = [reply.first_token_seconds for reply in replies[kind]]
        load.findings.series[f"half load, {kind}"] = rounds(seconds)
        load.findings.series[f"half load, {kind}, allowed"] = [allowed[kind]]
        note = f"alone: encode + prefill {1000 * own[kind]:.1f} ms"
        aim = 1000 * allowed[kind]
        load.findings.add(
            "half-load", f"half load, {kind}: time to first token, p95", milliseconds(seconds), "ms", aim=aim, note=note
        )
        shares += [value / allowed[kind] for value in seconds]
    what = "half load: time to first token over what is allowed, p95"
    load.findings.add("half-load", what, shares, "×", aim=1.0, note=f"{rate:.2f} requests/s, {count} in all")


async def gaps(load: Load) -> None:
    """Times between the pieces of running answers while long prompts come, one after the other."""
    chunk, group = await load.chunk_seconds(last=True), await load.group_seconds(long=True)
    tokens = min(32, load.context // 8)
    prompts = [streamed(load.of_tokens(load.long_prompt(tokens), tokens)) for _ in range(load.options.trials)]
    running, over = max(1, min(load.options.slots - 1, load.options.most_clients)), asyncio.Event()
    replies: list[Reply] = []

    async def write() -> None:
        while not over.is_set():
            replies.append(await load.ask_tokens(32, min(1024, load.context - 32)))

    async def arrive() -> list[Reply]:
        await load.ask_tokens(32, 2)  # its turn comes after the others' prompts
        arrived = [load.expect(await load.client.stream(COMPLETIONS, prompt)) for prompt in prompts]
        over.set()
        return arrived

    *_, arrived = await together([*(write() for _ in range(running)), arrive()])
    begin, end = arrived[0].sent, arrived[-1].ended
    seconds = [gap for reply in replies for when, gap in reply.gaps if begin < when < end]
    load.findings.series["gaps"] = rounds(seconds)
    load.findings.series["gaps, allowed"] = [_MARGIN * (chunk + group)]
    load.findings.add(
        "gaps",
        f"longest gap between tokens while prompts of {load.long_prompt(tokens):,} come",
        1000 * max(seconds),
        "ms",
        aim=1000 * _MARGIN * (chunk + group),
        p50=1000 * middle(seconds),
        p95=1000 * p95(seconds),
        note=f"one chunk {1000 * chunk:.1f} ms, one group {1000 * group:.1f} ms, {len(seconds)} gaps",
    )


async def second_turn(load: Load) -> None:
    """A second question about a picture of nine tiles, whose first one has been answered."""
    firsts, seconds = [], []
    tiles = 0
    for _ in range(load.options.trials):
        picture = png_url(load.requests.picture(3, 3))
        opening = ask([picture], load.requests.question())
        first = await load.ask(chat(opening, max_tokens=16, stream_options={"include_usage": True}))
        tiles = first.usage["prompt_tokens_details"]["tiles"]
        said = {"role": "assistant", "content": first.text}
        second = await load.ask(chat(opening, said, ask([], load.requests.question()), max_tokens=16))
        firsts.append(first.first_token_seconds)
        seconds.append(second.first_token_seconds)
    load.findings.series["first turn"], load.findings.series["second turn"] = rounds(firsts), rounds(seconds)
    load.findings.add("second-turn", f"first turn, {tiles} tiles: time to first token, p95", milliseconds(firsts), "ms")
    load.findings.add("second-turn", "second turn: time to first token, p95", milliseconds(seconds), "ms")
    shares = [second / first for first, second in zip(firsts, seconds, strict=True)]
    what = "second turn over first, time to first token, median"
    load.findings.add("second-turn", what, middle(shares), "×", aim=_SECOND_TURN, p50=middle(shares), p95=p95(shares))


async def loop_stall(load: Load) -> None:
    """The event loop's longest stall while every client sends large photographs."""
    clients, each = load.options.most_clients, 2
    photographs = await asyncio.to_thread(
        lambda: [url(load.requests.photograph(load.options.megapixels), "jpeg") for _ in range(min(clients, 8))]
    )
    tokens = load.options.output_tokens
    bodies = [
        streamed(fixed_length(chat(ask([photographs[i % len(photographs)]], load.requests.question())), tokens))
        for i in range(clients * each)
    ]
    await asyncio.sleep(_WINDOW)  # until what was before is out of the gauge's window
    lags, over = [], asyncio.Event()

    async def watch() -> None:
        while not over.is_set():
            lags.append((await load.client.metrics())["event_loop_lag_seconds"])
            await asyncio.wait([asyncio.ensure_future(over.wait())], timeout=_WINDOW / 5)
        lags.append((await load.client.metrics())["event_loop_lag_seconds"])

    async def send() -> list[Reply]:
        async def one() -> list[Reply]:
            return [load.expect(await load.client.stream(CHAT, bodies.pop())) for _ in range(each)]

        replies = [reply for some in await together(one() for _ in range(clients)) for reply in some]
        over.set()
        return replies

    _, replies = await together([watch(), send()])
    first = milliseconds([reply.first_token_seconds for reply in replies])
    note = f"{len(replies)} requests of {len(photographs[0]) * 3 / 4e6:.1f} MB each"
    what = f"event loop's longest stall, {clients} clients sending {load.options.megapixels:g}-megapixel JPEGs"
    load.findings.add("loop", what, 1000 * max(lags), "ms", aim=_LAG, note=note)
    load.findings.add("loop", "the same: time to first token, p95", first, "ms")


def milliseconds(seconds: list[float]) -> list[float]:
    return [1000 * value for value in seconds]
