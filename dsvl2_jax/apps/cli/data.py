"""`dsvl2 data`: checking data sets, and importing published benchmarks.

Tested in tests/train/data/test_check.py and tests/infer/eval/test_benchmarks.py.
"""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import Arguments, FrameChoice, command_group, needs_train_extra


def check(
    file: Positional[str],
    *,
    ckpt: str | None = None,
    images: str = "",
    follow_links: bool = False,
    boxes: str = "auto",
    sequence_length: int = 4096,
    tiles_per_sequence: int = 20,
    mask_prompt: bool = False,
    as_seen: bool = False,
    max_tiles: int | None = None,
    min_tiles: int | None = None,
    frames: int | None = None,
    frame_choice: FrameChoice | None = None,
    count: int | None = None,
    argument: Arguments = (),
    problems: int = 20,
    histogram: Path | None = None,
    draw: Path | None = None,
    json: bool = False,
) -> int:
    """Check a training data set: what is in it, and what is wrong with it; exit status 1 when a sample is broken.

    Args:
        file: JSON Lines (also .gz, .zst), a JSON array, .parquet, .arrow, .txt or .tar; a glob pattern may name
            several, or a folder a Hugging Face data set.
        ckpt: checkpoint whose tokenizer and tiling count; without it, the bundled model's.
        images: folder, or tar shards (a glob ending in .tar), of the images; without it, the file's folder.
        follow_links: links in the folder of images may lead out of it.
        boxes: what boxes under "objects" are that do not say it: pixels, 0-1 or 0-1000; auto: decided for each.
        sequence_length: tokens of a training row.
        tiles_per_sequence: image tiles of a training row.
        mask_prompt: count answers alone as learnt, as in fine-tuning.
        as_seen: read images as with the setting data.as_seen.
        max_tiles: cut an image into at most this many tiles, as with the setting data.max_tiles.
        min_tiles: cut an image into at least this many tiles, as with the setting data.min_tiles.
        frames: take at most this many frames of a video, as with the setting data.frames; 8 without it.
        frame_choice: as with the setting data.frame_choice; even without it.
        count: FILE is a Python function, as module:name, and so many of its records are checked.
        argument: keyword that the function is called with; may be given several times.
        problems: how many broken samples to list; all are counted.
        histogram: PNG to draw token and tile counts to.
        draw: folder to write pictures of up to 20 samples to, with their boxes.
        json: print one JSON object.
    """
    with needs_train_extra():
        from dsvl2_jax.train.data.check import check as run

        return run(
            file,
            checkpoint=ckpt,
            images=images,
            follow_links=follow_links,
            boxes=boxes,
            sequence_length=sequence_length,
            tiles_per_sequence=tiles_per_sequence,
            mask_prompt=mask_prompt,
            as_seen=as_seen,
            max_tiles=max_tiles,
            min_tiles=min_tiles,
            frames=frames,
            frame_choice=frame_choice,
            count=count,
            arguments=argument,
            most_problems=problems,
            histogram=histogram,
            draw=draw,
            as_json=json,
        )


def import_(source: Positional[Path]) -> None:
    """Write a published benchmark as a file of questions for `dsvl2 eval`, and print its name.

    Args:
        source: a table of VLMEvalKit, NAME.tsv (writes NAME.jsonl and the images to NAME/), or the folder of a download
            of jxu124/refcoco-benchmark (writes val.jsonl and images/ into it; needs pyarrow).
    """
    from dsvl2_jax.infer.eval.benchmarks import import_benchmark

    print(import_benchmark(source))


data = command_group("Check data sets, and import published benchmarks.", {"check": check, "import": import_})
