"""`dsvl2 eval`: answers to files of questions, and their scores.

Tested in tests/infer/eval/test_evaluate.py and test_client.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import CacheDtype, Dtype, Together
from dsvl2_jax.errors import UsageError
from dsvl2_jax.runtime.processes import Processes

Metric = Literal["exact", "contains", "anls", "relaxed", "vqa", "choice", "iou", "facts"]


def evaluate(
    files: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[CKPT] DATA.jsonl")]],
    *,
    metric: Metric | None = None,
    images: str = "",
    follow_links: bool = False,
    out: Path | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 128,
    speculate: int | None = None,
    dtype: Dtype | None = None,
    cache_dtype: CacheDtype | None = None,
    mesh: str | None = None,
    verify: bool = False,
    adapter: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None,
    context: int | None = None,
    rope_scaling: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None,
    max_tiles: int | None = None,
    min_tiles: int | None = None,
    as_seen: bool = False,
    prompt_template: str | None = None,
    limit: int | None = None,
    report_samples: int = 1000,
    json: bool = False,
    server: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    server_model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    api_key_file: Path | None = None,
    concurrency: int | None = None,
    timeout: float | None = None,
    extra_body: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None,
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> None:
    """Answer a file of questions and score the answers; docs/evaluation.md says how to run the benchmarks.

    Started again with the same checkpoint, data and options it resumes where it was stopped.

    Args:
        files: checkpoint (without it, the bundled model) and a file with one question a line.
        metric: how answers are scored, where a line does not say so itself.
        images: folder, or tar shards (a glob ending in .tar), of the images; without it, the file's folder.
        follow_links: links in the folder of images may lead out of it.
        out: directory for results.jsonl, summary.json and report.html; without it, eval/CHECKPOINT/DATA.
        batch_size: questions answered together; 16 without it.
        max_new_tokens: the most tokens of an answer.
        speculate: draft this many tokens a step where the text repeats its prompt or itself; none without it.
        dtype: in which the model computes; float32 without it.
        cache_dtype: in which the cache keeps earlier tokens: int8 takes half the memory; without it, that of dtype.
        mesh: shard over devices, e.g. data=2,tensor=2,expert=2.
        verify: read every file of the checkpoint first and compare it with its digest.
        adapter: a LoRA or DoRA adapter for the checkpoint: a directory that training or peft wrote, or a hub id.
        context: the most positions of a question and its answer; as many as the model was made for without it.
        rope_scaling: scale positions so, instead of as config.json says, as in '{"type": "yarn", "factor": 4}'.
        max_tiles: cut an image into at most this many tiles (InfoVQA: 18) instead of as the checkpoint says (9).
        min_tiles: cut an image into at least this many tiles, however many images there are.
        as_seen: read images as people see them: turned as EXIF says, transparency over white, 16-bit gray divided.
            Boxes are then in pixels of the turned image.
        prompt_template: the prompt around {question} and {choices}; \\n is a new line.
        limit: answer only the first questions, this many of them.
        report_samples: show at most this many samples of each task in report.html.
        json: print the summary as one JSON object.
        server: an OpenAI-compatible server, which answers instead of a checkpoint, e.g. http://127.0.0.1:8000.
        server_model: the model that the server is asked for; without it, the first that it has.
        api_key_file: a file with the server's API key; without it, the key is that of DSVL2_API_KEY, if set.
        concurrency: questions asked at the same time; 16 without it.
        timeout: seconds to wait for one answer; 600 without it.
        extra_body: further fields of every request, as in '{"skip_special_tokens": false}'.
    """
    loaded_only = {"batch_size": batch_size, "dtype": dtype, "mesh": mesh, "speculate": speculate}
    loaded_only |= {"cache_dtype": cache_dtype, "max_tiles": max_tiles, "min_tiles": min_tiles}
    loaded_only |= {"verify": verify or None, "adapter": adapter, "context": context, "rope_scaling": rope_scaling}
    server_only = {
        "server_model": server_model,
        "api_key_file": api_key_file,
        "concurrency": concurrency,
        "timeout": timeout,
        "extra_body": extra_body,
    }
    shared = {
        "metric": metric,
        "images": images,
        "follow_links": follow_links,
        "out": out,
        "max_new_tokens": max_new_tokens,
        "as_seen": as_seen,
        "prompt_template": prompt_template,
        "limit": limit,
        "report_samples": report_samples,
        "as_json": json,
    }
    if server is None:
        _refuse(server_only, "belongs to a server: give its address with --server.")
        together.join({"files": files, **shared, **loaded_only})
        most = 2
    else:
        alone = {"processes": together.processes, "coordinator": together.coordinator, "process": together.process}
        _refuse(loaded_only | alone, "is for a model that is loaded here, but --server answers. Leave one of them out.")
        most = 1
    if not 1 <= len(files) <= most:
        expected = "[CKPT] DATA.jsonl" if server is None else "DATA.jsonl alone with --server"
        raise UsageError(f"eval: found {len(files)} arguments, expected {expected}.")
    from dsvl2_jax.infer.eval.chat_request import ServerOptions
    from dsvl2_jax.infer.eval.evaluate import EvalOptions
    from dsvl2_jax.infer.eval.evaluate import evaluate as run

    asked = None if server is None else ServerOptions(server, **_given(server_only))
    options = EvalOptions(**shared, **_given(loaded_only), server=asked)
    run(files[0] if len(files) == 2 else None, Path(files[-1]), options)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have a value; the others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: Mapping[str, Any], why: str) -> None:
    """Raises UsageError when one of the options was given."""
    for name in _given(options):
        raise UsageError(f"--{name.replace('_', '-')}: {why}")
