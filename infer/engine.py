"""`load` and `Model`: the thin stateful layer over the pure functions.

A `Model` prepares batches (buckets, padding, index arithmetic), calls the jitted functions and turns
tokens back into text. Every compiled program depends on bucket sizes alone, never on a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dsvl2_jax
from dsvl2_jax.checkpoint.adapters import read_adapter
from dsvl2_jax.checkpoint.apply_adapter import with_adapter
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import open_model, resolve
from dsvl2_jax.checkpoint.verify import tell
from dsvl2_jax.checkpoint.verify import verify as verify_files
from dsvl2_jax.errors import ConversationError, DSVL2Error, UsageError
from dsvl2_jax.infer.adapters import BASE, Adapters, side_by_side
from dsvl2_jax.infer.answer import Generation
from dsvl2_jax.infer.buckets import batch_bucket, cache_bucket, length_bucket, tile_bucket
from dsvl2_jax.infer.executor import adapt_tiles
from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.sampling import SamplingParams
from dsvl2_jax.infer.scheduler import Scheduler, Ticket
from dsvl2_jax.infer.slots import PAGE
from dsvl2_jax.infer.speculation import check_drafts
from dsvl2_jax.inputs.batch import Batch, collate
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.kernels.tuning import table_digest
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.cache import check_cache_dtype
from dsvl2_jax.model.config import Config, with_rope_scaling
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.weights import for_rows
from dsvl2_jax.runtime.compile_cache import enable_compilation_cache
from dsvl2_jax.runtime.malloc import keep_freed_memory
from dsvl2_jax.runtime.stored_programs import StoredPrograms
from dsvl2_jax.runtime.timing import Timing, compile_log
from dsvl2_jax.sharding import SEQUENCE

SLOTS = 8  # answers that grow at a time, in serving too: the same shapes give the same bits
FEATURE_BYTES = 256 << 20  # of pictures' features that are kept while prompts are answered
_AHEAD = 2  # requests that wait for a slot while others are answered


def load(
    path: str | Path | None = None,
    dtype: str | None = "float32",
    mesh: Mesh | None = None,
    *,
    cache_dtype: str | None = None,
    verify: bool = False,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    context: int | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> Model:
    """Loads a model for inference.

    Args:
      path: a converted (Orbax) directory, a directory in the released layout, a training run's directory (its newest
        checkpoint) or one of its checkpoints, or a hub id; None: the bundled model.
      dtype: "float32" or "bfloat16", to which weights are cast and in which the model computes (the router
        stays float32); None keeps the stored dtypes and computes in that of the embeddings.
      mesh: of `dsvl2_jax.sharding.make_mesh`; None: one device. With devices of several processes, all of them make
        the same calls with the same inputs.
      cache_dtype: "float32", "bfloat16" or "int8", in which the cache keeps what attention reads of earlier tokens;
        None: as the model computes. int8 has a scale for each vector, and takes about half the bytes of bfloat16.
      verify: read every file of the checkpoint before, and compare it with its digest.
      adapter: the directory of a LoRA or DoRA adapter for this checkpoint, as training and the `peft` package write
        them, or a hub id; None: none. Several by name: each prompt chooses one of them or none, see `Model.generate`.
      context: the most positions of a prompt and its answer together; None: ``max_position_embeddings``. A note on
        standard error says where that is more than the model was made for.
      rope_scaling: how positions are scaled, instead of what config.json says; as it says it there.

    Raises:
      CheckpointError, ConfigError, TokenizerError: the checkpoint or an adapter cannot be used; the message says why.
      UsageError: a dtype that is none of those, or adapters that cannot lie side by side.
    """
    check_cache_dtype(cache_dtype)
    compile_log()
    enable_compilation_cache()
    keep_freed_memory()
    if context is not None and context < 1:
        raise UsageError(f"a context of {context} positions holds nothing; give a positive number.")
    if mesh is not None and SEQUENCE in mesh.axis_names:
        raise UsageError(
            f"a mesh with {SEQUENCE} is for training, where it splits rows; here a cache is split along its length by "
            "itself, over the axes that its slots leave free: use data, tensor and expert."
        )
    directory = resolve(path)
    if verify:
        tell(directory, verify_files(directory))
    config, processor = open_model(directory)
    if rope_scaling is not None:
        config = with_rope_scaling(config, rope_scaling)
    made_for = config.language.longest_context
    if context is not None and context > made_for:
        told = f"a context of {context} is beyond the {made_for} positions that the model was made for: expect worse "
        tell(directory, [told + "answers beyond them (rope_scaling stretches positions; docs/contexts.md)"])
    several = isinstance(adapter, Mapping)
    sources = dict(adapter) if several else {} if adapter is None else {"": adapter}
    read = {name: read_adapter(source, config) for name, source in sources.items()}
    params, adapters = load_params(directory, config, dtype=dtype, mesh=mesh), None
    if read:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            adapted = {
                name: with_adapter(params, config, *one, mesh=mesh, source=sources[name]) for name, one in read.items()
            }
            params, adapters = side_by_side(params, adapted) if several else (adapted[""], None)
    return Model(config, params, processor, mesh, adapters, cache_dtype=cache_dtype, context=context)


class Model:
    """A loaded model: ``config``, ``params``, ``processor`` and the calls of docs/python.md.

    Attributes:
      adapters: those that lie side by side in ``params``, of which each prompt chooses one or none; None: there is
        nothing to choose.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        processor: Processor,
        mesh: Mesh | None = None,
        adapters: Adapters | None = None,
        *,
        cache_dtype: str | None = None,
        context: int | None = None,
    ):
        check_cache_dtype(cache_dtype)
        self.config = config
        self._context = context
        self.params = params
        self.processor = processor
        self.mesh = mesh
        self._cache_dtype = cache_dtype
        self.adapters = adapters
        self._mean = np.asarray(processor.config.image_mean, np.float32)
        self._std = np.asarray(processor.config.image_std, np.float32)
        self._programs: StoredPrograms | None = None
        compile_log()

    @property
    def context(self) -> int:
        """The most positions of a prompt and its answer together."""
        return self._context or self.config.language.max_position_embeddings

    @property
    def dtype(self) -> str:
        return jnp.dtype(model.compute_dtype(self.params)).name

    @property
    def cache_dtype(self) -> str:
        return self._cache_dtype or self.dtype

    def _params_for(self, adapter: str | None, rows: int) -> Params:
        """The parameters for a batch all of whose rows want one adapter."""
        if self.adapters is None and adapter is None:
            return self.params
        return for_rows(self.params, np.full(rows, self._adapter(adapter), np.int32))

    def _adapter(self, name: str | None) -> int:
        if self.adapters is None and name is not None:
            raise UsageError(f"adapter: found {name!r}, but this model has no adapters to choose from.")
        return BASE if self.adapters is None else self.adapters.number(name)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def store_programs(self, folder: Path | None = None) -> None:
        """Keeps the engine's programs on disk from now on; see `StoredPrograms`.

        Not where processes share the model, nor where jax's own cache is switched off.
        """
        devices = jax.tree.leaves(self.params)[0].sharding.device_set
        if jax.config.jax_enable_compilation_cache and all(
            device.process_index == jax.process_index() for device in devices
        ):
            sources = [Path(dsvl2_jax.__file__).parent, Path(__file__).parent]
            self._programs = StoredPrograms(list(devices), sources, folder, tuning=table_digest())

    def run(self, function: Callable, static: Mapping[str, Any], **arrays: Any) -> Any:
        """A jitted function of keyword arguments, of which ``static`` are the static ones, on the model's mesh."""
        with self.on_mesh():
            if self._programs is None:
                return function(**static, **arrays)
            return self._programs.call(function, static, arrays)

    def fetch(self, arrays: Any) -> Any:
        """A tree of arrays as numpy: the same in every process, though each holds only a part of them."""
        return jax.device_get(self._whole(arrays))

    def _whole(self, arrays: Any) -> Any:
        """Arrays that the devices of other processes hold in part, copied to all devices."""
        if self.mesh is None or all(array.is_fully_addressable for array in jax.tree.leaves(arrays)):
            return arrays
        return jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec()))

    def encode_tiles(self, tiles: np.ndarray, *, adapter: str | None = None) -> jax.Array:
        """u8[N, S, S, 3] → f32[N, P, W]: the encoder's output after ``vision.norm``."""
        return self._tiles(_encode_tiles, tiles, adapter).astype(jnp.float32)

    def adapt_tiles(self, tiles: np.ndarray, *, adapter: str | None = None) -> jax.Array:
        """u8[N, S, S, 3] → f32[N, tokens per tile, D]: the adaptor's output."""
        return self._tiles(adapt_tiles, tiles, adapter).astype(jnp.float32)

    def embed(self, inputs: ModelInputs, *, adapter: str | None = None) -> jax.Array:
        """f32[T, D]: text and image embeddings merged."""
        batch = self._batch([inputs])
        with self.on_mesh():
            features = self.features(batch.tiles, self._adapter(adapter))
            merged = self._whole(_merge(self.params, self.config, batch.ids, batch.image_index, features))
        return merged[0, : batch.lengths[0]].astype(jnp.float32)

    def logits(
        self, inputs: ModelInputs | Sequence[ModelInputs], *, adapter: str | None = None
    ) -> jax.Array | list[jax.Array]:
        """f32[T, V] for one input, a list of them for a list: the logits after every token."""
        single = isinstance(inputs, ModelInputs)
        batch = self._batch([inputs] if single else list(inputs))
        with self.on_mesh():
            features = self.features(batch.tiles, self._adapter(adapter))
            params = self._params_for(adapter, len(batch.ids))
            out = _all_logits(params, self.config, batch.ids, batch.image_index, features, batch.lengths)
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
        slots: int = SLOTS,
        speculate: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        timing: Timing | None = None,
    ) -> Generation | list[Generation]:
        """Answers one prompt, or many of any lengths.

        An answer is the same in any company, bit for bit.

        Args:
          inputs: of `processor`, made with ``inference=True``.
          max_new_tokens: the most tokens of an answer; the context's end may come first.
          sampling: one setting for all, or one per prompt.
          chunk_size: how many prompt tokens to prefill at a time, to bound memory; at most 512, and None means that.
          logprobs: also return each token's log-probability.
          slots: how many answers grow at a time; a slot that becomes free takes the next prompt.
          speculate: the most tokens that a step drafts from what the prompt and the answer have already, so that text
            which repeats comes faster; see `dsvl2_jax.infer.speculation`. 0: none.
          adapter: of `adapters`, one for all or one per prompt; None: the model without any.
          on_text: called with (index of the prompt, new text) while the answers grow.
          timing: filled with the seconds of encode, prefill, decode and compile.

        Returns:
          One `Generation`, or a list of them for a list.

        Raises:
          ConversationError: a prompt does not fit the context.
          FailedError: the model computed what is no number.
          UsageError: max_new_tokens, chunk_size or slots is not positive, speculate out of range, or there is no such
            adapter.
        """
        single = isinstance(inputs, ModelInputs)
        prompts = [inputs] if single else list(inputs)
        if not prompts:
            return []
        settings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        for name, given in (("sampling", settings), ("adapter", adapters)):
            if len(given) != len(prompts):
                raise UsageError(
                    f"{name}: found {len(given)} settings for {len(prompts)} prompts; give one, or one each."
                )
        for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size), ("slots", slots)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: found {value}, expected a positive whole number.")
        for prompt in prompts:
            self.check_context(prompt)
        requests = [
            Request(p, max_new_tokens, s, adapter=self._adapter(a))
            for p, s, a in zip(prompts, settings, adapters, strict=True)
        ]
        for phase in ("encode", "prefill", "decode", "compile") if timing is not None else ():
            timing.setdefault(phase, 0.0)
        longest = max(map(self.last_position, requests))
        answers: dict[int, Generation] = {}
        for index, news in self.answers(
            requests, slots, longest, chunk_size=chunk_size, speculate=speculate, timing=timing
        ):
            if isinstance(news, DSVL2Error):
                raise news
            if isinstance(news, Generation):
                answers[index] = news if logprobs else dataclasses.replace(news, logprobs=None)
            elif on_text is not None and news:
                on_text(index, news)
        return answers[0] if single else [answers[i] for i in range(len(prompts))]

    def answers(
        self,
        requests: Iterable[Request],
        slots: int,
        last_position: int = 0,
        *,
        chunk_size: int | None = None,
        speculate: int = 0,
        timing: Timing | None = None,
    ) -> Iterator[tuple[int, str | Generation | DSVL2Error]]:
        """Answers requests, each as soon as a slot is free; they are taken from the iterator as they are needed.

        Args:
          requests: any number. Longer ones first are answered faster: the cache is made for those that have come.
          slots: how many answers grow at a time.
          last_position: the largest `last_position` that is to be expected.
          chunk_size, speculate, timing: as `generate` has them.

        Yields:
          (index of the request, new text of its answer), and in the end (index, the whole `Generation`) or (index, why
          there is none).

        Raises:
          ConversationError: a prompt does not fit the context.
          UsageError: speculate is out of range.
        """
        check_drafts("speculate", speculate)
        chunk = PAGE if chunk_size is None else min(chunk_size, PAGE)
        indices: dict[Ticket, int] = {}
        scheduler: Scheduler | None = None
        waiting = enumerate(requests)
        upcoming = next(waiting, None)
        while upcoming is not None or (scheduler is not None and not scheduler.idle):
            while upcoming is not None and (scheduler is None or len(scheduler.queue) < _AHEAD):
                index, request = upcoming
                last_position = max(last_position, self.last_position(request))
                if scheduler is None or last_position > scheduler.last_position:
                    if scheduler is not None and not scheduler.idle:
                        break  # what has begun ends in the cache that it has
                    scheduler = self._scheduler(slots, last_position, chunk, speculate, timing)
                indices[scheduler.submit(request)] = index
                upcoming = next(waiting, None)
            for ticket, delta in scheduler.turn():
                if delta is None:
                    yield indices.pop(ticket), ticket.error
                    continue
                yield indices[ticket], delta.text
                if delta.finish_reason is not None:
                    answer = ticket.answer.generation(ticket.request.inputs, True)
                    drafts = {"drafted_tokens": ticket.drafted, "accepted_tokens": ticket.accepted}
                    yield indices.pop(ticket), dataclasses.replace(answer, **drafts)

    def _scheduler(
        self, slots: int, last_position: int, chunk: int, speculate: int, timing: Timing | None
    ) -> Scheduler:
        # A chunk that begins within a page may reach into the next one.
        spare = 0 if chunk == PAGE else PAGE
        length = cache_bucket(last_position, PAGE, self.context) + spare
        slots = self.whole_slots(slots)
        return Scheduler(self, slots, length, feature_bytes=FEATURE_BYTES, chunk=chunk, timing=timing, drafts=speculate)

    def last_position(self, request: Request) -> int:
        """The last position that a token of the answer may have."""
        return min(len(request.inputs.input_ids) + request.max_new_tokens - 1, self.context)

    def whole_slots(self, slots: int) -> int:
        """So many slots, or a few more: as many on each device of a mesh."""
        devices = 1 if self.mesh is None else self.mesh.size
        return -(-slots // devices) * devices

    def check_context(self, prompt: ModelInputs) -> None:
        """Raises ConversationError when a prompt is longer than the context."""
        context, tokens = self.context, len(prompt.input_ids)
        if tokens > context:
            images = int(prompt.image_mask.sum())
            raise ConversationError(
                f"the prompt has {tokens} tokens ({images} of them image tokens), but the model's context is {context} "
                "(max_position_embeddings, or --context); shorten the text, or use fewer or less elongated images, "
                "fewer frames of a video, or a lower max_tiles."
            )

    def _tiles(self, function: Callable, tiles: np.ndarray, adapter: str | None) -> jax.Array:
        """Runs a tile function on a bucket of tiles and cuts the padding off again."""
        count = tiles.shape[0]
        devices = 1 if self.mesh is None else self.mesh.size
        padded = np.pad(tiles, ((0, tile_bucket(count, devices) - count), (0, 0), (0, 0), (0, 0)))
        with self.on_mesh():
            params = self._params_for(adapter, len(padded))
            return self._whole(function(params, self.config, padded, self._mean, self._std)[:count])

    def features(self, padded_tiles: np.ndarray, adapter: int = BASE) -> jax.Array:
        """Adaptor outputs of tiles already padded to a bucket, with the adapter of a number."""
        if padded_tiles.shape[0] == 0:
            return jnp.zeros((0, self.config.tokens_per_tile, self.config.language.hidden_size), self.dtype)
        arrays = {"params": self.params, "tiles": padded_tiles, "mean": self._mean, "std": self._std}
        if self.adapters is not None:
            arrays["adapters_n"] = np.full(len(padded_tiles), adapter, np.int32)
        return self.run(adapt_tiles, {"config": self.config}, **arrays)

    def _batch(self, prompts: list[ModelInputs]) -> Batch:
        """Pads prompts to the buckets that programs are compiled for."""
        tiles = sum(len(prompt.tiles) for prompt in prompts)
        return collate(
            prompts,
            self.config,
            rows=batch_bucket(len(prompts)),
            length=length_bucket(max(len(prompt.input_ids) for prompt in prompts)),
            tile_count=tile_bucket(tiles, 1 if self.mesh is None else self.mesh.size),
        )


_encode_tiles = jax.jit(model.encode_tiles, static_argnames="config")
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
