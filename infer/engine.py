"""`load` and `Model`: the thin stateful layer over the pure functions.

A `Model` prepares batches (buckets, padding, index arithmetic), calls the jitted functions and turns
tokens back into text. Every compiled program depends on bucket sizes alone, never on a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import open_model, resolve
from dsvl2_jax.errors import ConversationError, UsageError
from dsvl2_jax.infer import decode
from dsvl2_jax.infer.answer import AnswerBuilder, Generation
from dsvl2_jax.infer.buckets import batch_bucket, length_bucket, tile_bucket
from dsvl2_jax.infer.sampling import SamplingArrays, SamplingParams
from dsvl2_jax.inputs.batch import Batch, collate
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import TEXT_POSITION, Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.runtime.compile_cache import enable_compilation_cache
from dsvl2_jax.runtime.timing import Timing, compile_log

# After how many tokens the host looks at them, for stop strings and to stream the text.
STREAM_STEPS = 8


@dataclasses.dataclass(frozen=True)
class MinBatchShape:
    """The smallest size of a batch before it is rounded up to buckets; 0: as its prompts need."""

    rows: int = 0
    length: int = 0  # tokens of a prompt
    tiles: int = 0  # of all prompts


def load(path: str | Path | None = None, dtype: str | None = "float32", mesh: Mesh | None = None) -> Model:
    """Loads a model for inference.

    Args:
      path: a converted (Orbax) directory, a directory in the released layout, a training run's directory (its newest
        checkpoint) or one of its checkpoints, or a hub id; None: the bundled model.
      dtype: "float32" or "bfloat16", to which weights are cast and in which the model computes (the router
        stays float32); None keeps the stored dtypes and computes in that of the embeddings.
      mesh: of `dsvl2_jax.sharding.make_mesh`; None: one device. With devices of several processes, all of them make
        the same calls with the same inputs.

    Raises:
      CheckpointError, ConfigError, TokenizerError: the checkpoint cannot be used; the message says why.
    """
    compile_log()
    enable_compilation_cache()
    directory = resolve(path)
    config, processor = open_model(directory)
    params = load_params(directory, config, dtype=dtype, mesh=mesh)
    return Model(config, params, processor, mesh)


class Model:
    """A loaded model: ``config``, ``params``, ``processor`` and the calls of docs/python.md."""

    def __init__(self, config: Config, params: Params, processor: Processor, mesh: Mesh | None = None):
        self.config = config
        self.params = params
        self.processor = processor
        self.mesh = mesh
        self._mean = np.asarray(processor.config.image_mean, np.float32)
        self._std = np.asarray(processor.config.image_std, np.float32)
        compile_log()

    @property
    def dtype(self) -> str:
        return jnp.dtype(model.compute_dtype(self.params)).name

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _fetch(self, arrays: Any) -> Any:
        """A tree of arrays as numpy: the same in every process, though each holds only a part of them."""
        return jax.device_get(self._whole(arrays))

    def _whole(self, arrays: Any) -> Any:
        """Arrays that the devices of other processes hold in part, copied to all devices."""
        if self.mesh is None or all(array.is_fully_addressable for array in jax.tree.leaves(arrays)):
            return arrays
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec()))

    def encode_tiles(self, tiles: np.ndarray) -> jax.Array:
        """u8[N, S, S, 3] → f32[N, P, W]: the encoder's output after ``vision.norm``."""
        return self._tiles(_encode_tiles, tiles).astype(jnp.float32)

    def adapt_tiles(self, tiles: np.ndarray) -> jax.Array:
        """u8[N, S, S, 3] → f32[N, tokens per tile, D]: the adaptor's output."""
        return self._tiles(_adapt_tiles, tiles).astype(jnp.float32)

    def embed(self, inputs: ModelInputs) -> jax.Array:
        """f32[T, D]: text and image embeddings merged."""
        batch = self._batch([inputs])
        with self._on_mesh():
            features = self._features(batch.tiles)
            merged = self._whole(_merge(self.params, self.config, batch.ids, batch.image_index, features))
        return merged[0, : batch.lengths[0]].astype(jnp.float32)

    def logits(self, inputs: ModelInputs | Sequence[ModelInputs]) -> jax.Array | list[jax.Array]:
        """f32[T, V] for one input, a list of them for a list: the logits after every token."""
        single = isinstance(inputs, ModelInputs)
        batch = self._batch([inputs] if single else list(inputs))
        with self._on_mesh():
            features = self._features(batch.tiles)
            out = _all_logits(self.params, self.config, batch.ids, batch.image_index, features, batch.lengths)
            out = self._whole(out)
        rows = [out[i, :length] for i, length in enumerate(batch.lengths) if length]
        return rows[0] if single else rows

    def generate(
        self,
        inputs: ModelInputs | Sequence[ModelInputs],
        max_new_tokens: int = 512,
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
        *,
        chunk_size: int | None = None,
        logprobs: bool = False,
        at_least: MinBatchShape = MinBatchShape(),
        on_text: Callable[[int, str], None] | None = None,
        timing: Timing | None = None,
    ) -> Generation | list[Generation]:
        """Answers one prompt, or a batch of prompts of any lengths.

        Args:
          inputs: of `processor`, made with ``inference=True``.
          max_new_tokens: the most tokens of an answer; the context's end may come first.
          sampling: one setting for all, or one per prompt.
          chunk_size: how many prompt tokens to prefill at a time, to bound memory; None: all of them.
          logprobs: also return each token's log-probability.
          at_least: pad the batch to this, so that batches of several sizes run the same programs.
          on_text: called with (index of the prompt, new text) while the answers grow.
          timing: filled with the seconds of encode, prefill, decode and compile.

        Returns:
          One `Generation`, or a list of them for a list.

        Raises:
          ConversationError: a prompt does not fit the context.
          UsageError: max_new_tokens or chunk_size is not positive.
        """
        single = isinstance(inputs, ModelInputs)
        prompts = [inputs] if single else list(inputs)
        if not prompts:
            return []
        settings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(settings) != len(prompts):
            raise UsageError(
                f"sampling: found {len(settings)} settings for {len(prompts)} prompts; give one, or one each."
            )
        for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: found {value}, expected a positive whole number.")
        for prompt in prompts:
            self.check_context(prompt)
        timing = Timing() if timing is None else timing
        eos = self.processor.tokenizer.eos_id
        answers = [AnswerBuilder(self.processor, s, eos) for s in settings]
        with self._on_mesh():
            watched = on_text is not None
            run = self._run(prompts, settings, max_new_tokens, chunk_size, timing, answers, at_least, watched)
            for tokens, values, counts in run:
                for i, answer in enumerate(answers):
                    new_text = answer.extend(tokens[i, : counts[i]], values[i, : counts[i]])
                    if on_text is not None and new_text:
                        on_text(i, new_text)
        for i, answer in enumerate(answers):
            rest = answer.finish()
            if on_text is not None and rest:
                on_text(i, rest)
        out = [answer.generation(prompt, logprobs) for answer, prompt in zip(answers, prompts, strict=True)]
        return out[0] if single else out

    def _run(
        self,
        prompts: list[ModelInputs],
        settings: list[SamplingParams],
        max_new_tokens: int,
        chunk_size: int | None,
        timing: Timing,
        answers: list[AnswerBuilder],
        at_least: MinBatchShape,
        watched: bool,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (tokens, log-probabilities, counts) until every answer has ended."""
        config, eos = self.config, self.processor.tokenizer.eos_id
        batch = self._batch(prompts, at_least)
        rows, length = batch.ids.shape
        lengths = batch.lengths
        context = config.language.max_position_embeddings
        max_new = np.where(lengths > 0, np.minimum(max_new_tokens, context - lengths + 1), 1).astype(np.int32)
        cache_length = length_bucket(max(length, int((lengths + max_new).max())))
        if chunk_size is not None:
            cache_length = max(cache_length, -(-length // chunk_size) * chunk_size)
        sampling = SamplingArrays.of(settings, rows)
        with timing.phase("encode"):
            features = jax.block_until_ready(self._features(batch.tiles))
        with timing.phase("prefill"):
            cache = decode.new_cache(config, rows, cache_length, self.dtype)
            logits, cache = self._prefill(batch, features, cache, chunk_size)
            state = decode.first_token(logits, batch.ids, lengths, max_new, cache, sampling, eos)
            first, first_logprobs, finished = self._fetch((state.tokens, state.logprobs, state.finished))
        yield first[:, None], first_logprobs[:, None], np.ones(rows, np.int32)
        # Looking often costs little; looking seldom would decode past stop strings and stream in bursts.
        steps = np.int32(STREAM_STEPS if watched or any(s.stop for s in settings) else decode.STEPS)
        while not finished[: len(prompts)].all() and not all(answer.stopped for answer in answers):
            with timing.phase("decode"):
                state, tokens, values, counts = decode.decode_tokens(self.params, config, state, sampling, steps, eos)
                tokens, values, counts, finished = self._fetch((tokens, values, counts, state.finished))
            yield tokens, values, counts

    def _prefill(self, batch: Batch, features: jax.Array, cache: Any, chunk_size: int | None) -> tuple[jax.Array, Any]:
        ids, index, lengths = batch.ids, batch.image_index, batch.lengths
        if chunk_size is None or ids.shape[1] <= chunk_size:
            return decode.prefill_tokens(self.params, self.config, ids, index, features, lengths, cache, None)
        chunks = -(-int(lengths.max()) // chunk_size)
        pad = ((0, 0), (0, max(0, chunks * chunk_size - ids.shape[1])))
        ids, index = np.pad(ids, pad), np.pad(index, pad, constant_values=TEXT_POSITION)
        logits = None
        for c in range(chunks):
            part = slice(c * chunk_size, (c + 1) * chunk_size)
            start = np.full(lengths.shape, c * chunk_size, np.int32)
            in_chunk = np.clip(lengths - start, 0, chunk_size).astype(np.int32)
            new, cache = decode.prefill_tokens(
                self.params, self.config, ids[:, part], index[:, part], features, in_chunk, cache, start
            )
            # A row's logits are those of the chunk in which it ends.
            logits = new if logits is None else jnp.where((in_chunk > 0)[:, None], new, logits)
        return logits, cache

    def check_context(self, prompt: ModelInputs) -> None:
        """Raises ConversationError when a prompt is longer than the context."""
        context, tokens = self.config.language.max_position_embeddings, len(prompt.input_ids)
        if tokens > context:
            images = int(prompt.image_mask.sum())
            raise ConversationError(
                f"the prompt has {tokens} tokens ({images} of them image tokens), but the model's context is {context} "
                "(max_position_embeddings); shorten the text, or use fewer or less elongated images."
            )

    def _tiles(self, function: Callable, tiles: np.ndarray) -> jax.Array:
        """Runs a tile function on a bucket of tiles and cuts the padding off again."""
        count = tiles.shape[0]
        devices = 1 if self.mesh is None else self.mesh.size
        padded = np.pad(tiles, ((0, tile_bucket(count, devices) - count), (0, 0), (0, 0), (0, 0)))
        with self._on_mesh():
            return self._whole(function(self.params, self.config, padded, self._mean, self._std)[:count])

    def _features(self, padded_tiles: np.ndarray) -> jax.Array:
        """Adaptor outputs of tiles already padded to a bucket."""
        if padded_tiles.shape[0] == 0:
            return jnp.zeros((0, self.config.tokens_per_tile, self.config.language.hidden_size), self.dtype)
        return _adapt_tiles(self.params, self.config, padded_tiles, self._mean, self._std)

    def _batch(self, prompts: list[ModelInputs], at_least: MinBatchShape = MinBatchShape()) -> Batch:
        """Pads prompts to the buckets that programs are compiled for."""
        tiles = max(sum(len(prompt.tiles) for prompt in prompts), at_least.tiles)
        return collate(
            prompts,
            self.config,
            rows=batch_bucket(max(len(prompts), at_least.rows)),
            length=length_bucket(max(at_least.length, *(len(prompt.input_ids) for prompt in prompts))),
            tile_count=tile_bucket(tiles, 1 if self.mesh is None else self.mesh.size),
        )


_encode_tiles = jax.jit(model.encode_tiles, static_argnames="config")
_adapt_tiles = jax.jit(model.adapt_tiles, static_argnames="config")
_merge = jax.jit(model.merge, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def _all_logits(
    params: Params,
    config: Config,
    ids_bt: jax.Array,
    image_index_bt: jax.Array,
    features: jax.Array,
    lengths_b: jax.Array,
) -> jax.Array:
    """f32[B, T, V], the logits after every token."""
    embeddings_btd = model.merge(params, config, ids_bt, image_index_bt, features)
    valid_bt = jnp.arange(ids_bt.shape[1]) < lengths_b[:, None]
    return model.output_logits(params, config, model.forward(params, config, embeddings_btd, valid_bt))
