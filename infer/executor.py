"""The device's side of the engine: arrays that live there, and one method for each program.

Arguments are numbers and numpy arrays, so that what one process does another can repeat.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsvl2_jax.infer import slots, speculation
from dsvl2_jax.infer.adapters import BASE, Adapters
from dsvl2_jax.infer.buckets import most_padding, tile_bucket
from dsvl2_jax.infer.memory import check_memory
from dsvl2_jax.infer.sampling import SamplingArrays, SamplingParams
from dsvl2_jax.infer.slots import PAGE, Steps
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.kernels.span_attention import SPAN, is_long
from dsvl2_jax.model import gpu_decode
from dsvl2_jax.model.cache import init_cache, token_bytes
from dsvl2_jax.model.config import TEXT_POSITION, Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.weights import are_plain

CHUNKS = (64, 128, 256, PAGE)  # lengths of a prompt's chunks

adapt_tiles = jax.jit(slots.adapt_tiles, static_argnames="config")
init_slots = jax.jit(slots.init_slots, static_argnames=("config", "slots", "cache_length", "dtype", "drafts"))
_init_features = jax.jit(slots.init_features, static_argnames=("config", "tiles", "dtype"))
init_row = jax.jit(init_cache, static_argnames=("config", "slots", "cache_length", "dtype"))
_place_features = jax.jit(slots.place_features, donate_argnames="table")
prefill_chunk = jax.jit(slots.prefill_chunk, static_argnames=("config", "read_length"), donate_argnames="row")
_take_page = jax.jit(slots.take_page)
_put_page = jax.jit(slots.put_page, donate_argnames="row")
_insert = jax.jit(slots.insert, static_argnames="eos", donate_argnames="state")
decode_group = jax.jit(
    slots.decode_group, static_argnames=("config", "eos", "cache_length", "top", "greedy"), donate_argnames="state"
)
_speculative_group = jax.jit(
    speculation.speculative_group,
    static_argnames=("config", "eos", "cache_length", "top", "drafts"),
    donate_argnames="state",
)


class LoadedModel(Protocol):
    """What the engine needs of a model; `dsvl2_jax.infer.engine.Model` is one."""

    config: Config
    params: Params
    processor: Processor
    mesh: Mesh | None
    adapters: Adapters | None

    @property
    def dtype(self) -> str: ...

    @property
    def cache_dtype(self) -> str: ...

    @property
    def context(self) -> int:
        """The most positions of a prompt and its answer together."""

    def run(self, function: Callable, static: Mapping[str, Any], **arrays: Any) -> Any:
        """A jitted function of keyword arguments, of which ``static`` are the static ones, on the model's mesh."""

    def features(self, padded_tiles: np.ndarray, adapter: int = BASE) -> jax.Array:
        """u8[N, S, S, 3] of a bucket's size → [N, tokens per tile, D]."""

    def fetch(self, arrays: Any) -> Any:
        """A tree of arrays as numpy, in every process."""

    def check_context(self, prompt: ModelInputs) -> None:
        """Raises ConversationError when a prompt is longer than the context."""


class Executor:
    """Slots, one row that is being prefilled, its pictures' features, and what the stores keep.

    Attributes:
      slots: decode rows. cache_length: positions of each, a multiple of `PAGE`.
      drafts: the most tokens that a step drafts for a row; 0: none.
    """

    def __init__(self, owner: LoadedModel, slots: int, cache_length: int, drafts: int = 0):
        self.model = owner
        self.slots = slots
        self.cache_length = cache_length
        self.drafts = drafts
        self.eos = owner.processor.tokenizer.eos_id
        # A prompt has at most so many tiles, and the last picture's are padded to their bucket.
        self._tiles = -(-owner.context // owner.config.tokens_per_tile) + most_padding(self._devices)
        dtypes = owner.dtype, owner.cache_dtype
        check_memory(owner.params, owner.config, owner.mesh, *dtypes, slots, cache_length, self._tiles)
        self._features: dict[Hashable, jax.Array] = {}
        self._pages: dict[Hashable, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Makes everything anew, after a failure of the device."""
        self._features.clear()
        self._pages.clear()
        cache = {"cache_length": self.cache_length, "dtype": self.model.cache_dtype}
        self._state = self._empty(init_slots, slots=self.slots, drafts=self.drafts > 0, **cache)
        self._draws = np.zeros(self.slots, np.bool_)  # slots whose tokens are drawn, or have biases
        self._adapters = np.full(self.slots, BASE, np.int32)  # of each slot
        self._table = self._empty(_init_features, tiles=self._tiles, dtype=self.model.dtype)
        self.new_row()

    def new_row(self) -> None:
        """An empty row for the next prompt, which goes into its slot whole.

        So nothing of an earlier prompt stays in either: zero times a number that is none would be none.
        """
        self._row = self._empty(init_row, slots=1, cache_length=self.cache_length, dtype=self.model.cache_dtype)

    def _empty(self, function: Callable, **static: Any) -> Any:
        """What ``function`` makes, bound to the model's device as all results of programs are.

        Arrays that are not would be arguments of another kind, and need other programs.
        """
        arrays = self.model.run(function, {"config": self.model.config, **static})
        return arrays if self.model.mesh is not None else jax.device_put(arrays, self._device)

    @functools.cached_property
    def _device(self) -> jax.Device:
        """The model's first."""
        return min(jax.tree.leaves(self.model.params)[0].sharding.device_set, key=lambda device: device.id)

    @property
    def _devices(self) -> int:
        return 1 if self.model.mesh is None else self.model.mesh.size

    def tile_bucket(self, tiles: int) -> int:
        return tile_bucket(tiles, self._devices)

    @functools.cached_property
    def page_bytes(self) -> int:
        return PAGE * token_bytes(self.model.config.language, self.model.cache_dtype)

    def feature_bytes(self, tiles: int) -> int:
        """Of a picture's features."""
        config = self.model.config
        width = config.tokens_per_tile * config.language.hidden_size
        return self.tile_bucket(tiles) * width * jnp.dtype(self.model.dtype).itemsize

    @functools.cached_property
    def _read_lengths(self) -> list[int]:
        """Lengths of a cache's beginning that programs are made for, which read it whole."""
        lengths = [PAGE << i for i in range(8) if PAGE << i < self.cache_length]
        return [*lengths, self.cache_length]

    @functools.cached_property
    def _prefill_lengths(self) -> list[int]:
        """The same for prefill, which reads no more than it needs of a long cache."""
        return [n for n in self._read_lengths if n <= SPAN or n == self.cache_length or not is_long(self.cache_length)]

    @functools.cached_property
    def decode_lengths(self) -> list[int]:
        """The same for decoding: one, where attention reads no more of the cache than is needed."""
        platform = self._device.platform if self.model.mesh is None else ""
        loops = platform == "cpu"
        skips = (
            platform == "gpu"
            and not self.drafts
            and are_plain(self.model.params["language"])
            and gpu_decode.is_supported(
                self.model.config.language,
                self.slots,
                jnp.dtype(self.model.dtype),
                [array.dtype for array in jax.tree.leaves(self._state.cache)],
            )
        )
        return [self.cache_length] if loops or skips else self._read_lengths

    @functools.cached_property
    def _asks_here(self) -> bool:
        """Whether a group that draws no tokens has a program of its own: on GPUs, where asking on the device costs."""
        return self._device.platform == "gpu" and not self.drafts

    def _wanted(self, adapters: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """What programs are told of the adapters of a batch's rows; nothing, where there are none to choose from."""
        return {} if self.model.adapters is None else {"adapters_b": np.asarray(adapters, np.int32)}

    def encode(self, key: Hashable, tiles: np.ndarray, adapter: int = BASE) -> None:
        """u8[N, S, S, 3] → features, kept under ``key`` until `drop_features`."""
        count = self.tile_bucket(len(tiles))
        padded = np.pad(tiles, ((0, count - len(tiles)), (0, 0), (0, 0), (0, 0)))
        self._features[key] = self.model.features(padded, adapter)

    def drop_features(self, key: Hashable) -> None:
        del self._features[key]

    def place(self, key: Hashable, first_tile: int) -> None:
        """Puts kept features among those of the prompt that is being prefilled."""
        self._table = self.model.run(
            _place_features, {}, table=self._table, features=self._features[key], first_tile=np.int32(first_tile)
        )

    def put_page(self, key: Hashable, page: int) -> None:
        self._row = self.model.run(_put_page, {}, row=self._row, contents=self._pages[key], page=np.int32(page))

    def take_page(self, key: Hashable, page: int) -> None:
        self._pages[key] = self.model.run(_take_page, {}, row=self._row, page=np.int32(page))

    def drop_page(self, key: Hashable) -> None:
        del self._pages[key]

    def prefill(self, ids: np.ndarray, image_index: np.ndarray, start: int, total: int, adapter: int = BASE) -> None:
        """Tokens of a prompt of ``total``, from ``start`` on: i32[T], i32[T]."""
        size = next(c for c in CHUNKS if len(ids) <= c)
        pad = (0, size - len(ids))
        ids_bt = np.pad(ids, pad)[None]
        index_bt = np.pad(image_index, pad, constant_values=TEXT_POSITION)[None]
        read = None if start == 0 else next(n for n in self._prefill_lengths if start + size <= n)
        self._logits, self._row = self.model.run(
            prefill_chunk,
            {"config": self.model.config, "read_length": read},
            params=self.model.params,
            ids_bt=ids_bt.astype(np.int32),
            image_index_bt=index_bt.astype(np.int32),
            features=self._table,
            length=np.int32(len(ids)),
            start=np.int32(start),
            total=np.int32(total),
            row=self._row,
            **self._wanted([adapter]),
        )

    def insert(
        self,
        slot: int,
        ids: np.ndarray,
        is_text: np.ndarray,
        limit: int,
        sampling: SamplingParams,
        choice: int,
        allowed: np.ndarray | None,
        adapter: int = BASE,
    ) -> Steps:
        """Puts the prefilled prompt into a slot; returns its first token, [1, 1], still on the device.

        Args:
          ids: i32[T], of the prompt. is_text: bool[T], where they are not of a picture.
          limit, allowed: see `dsvl2_jax.infer.slots.insert`.
        """
        vocab = self.model.config.language.vocab_size
        seen = np.zeros((1, vocab), np.bool_)
        seen[0, ids] = True
        self._adapters[slot] = adapter
        self._draws[slot] = sampling.temperature > 0 or bool(sampling.logit_bias)
        allowed_bv = np.ones((1, vocab), np.bool_) if allowed is None else allowed[None]
        ids_bs = None
        if self.drafts:
            ids_bs = np.full((1, self.cache_length), -1, np.int32)
            ids_bs[0, : len(ids)] = np.where(is_text, ids, -1)
        self._state, step = self.model.run(
            _insert,
            {"eos": self.eos},
            state=self._state,
            slot=np.int32(slot),
            row=self._row,
            logits_bv=self._logits,
            seen_bv=seen,
            allowed_bv=allowed_bv,
            sampling=SamplingArrays.of([sampling], [choice]),
            length=np.int32(len(ids)),
            limit=np.int32(limit),
            ids_bs=ids_bs,
        )
        return step

    def decode(
        self,
        budget: np.ndarray,
        allowed: np.ndarray | None,
        needed: int,
        *,
        top: bool,
        may_draft: np.ndarray | None = None,
    ) -> Steps:
        """A group of steps, still on the device.

        Args:
          budget: i32[slots]; see `decode_group`. allowed: bool[slots, V] or None.
          needed: positions that the steps read or write.
          top: whether the most likely tokens are told; with ``allowed`` they always are.
          may_draft: bool[slots], for which rows tokens may be drafted; None: for none.
        """
        length = next(n for n in self.decode_lengths if needed <= n)
        static = {"config": self.model.config, "eos": self.eos, "cache_length": length}
        static["top"] = top or allowed is not None
        arrays = {"params": self.model.params, "state": self._state, "budget_b": budget, "allowed_bv": allowed}
        arrays |= self._wanted(np.where(budget > 0, self._adapters, BASE))
        if self.drafts:
            static["drafts"] = self.drafts
            arrays["may_draft_b"] = np.zeros(self.slots, np.bool_) if may_draft is None else may_draft
        else:
            static["greedy"] = self._asks_here and not (self._draws & (budget > 0)).any()
        function = _speculative_group if self.drafts else decode_group
        self._state, steps = self.model.run(function, static, **arrays)
        return steps

    def fetch(self, steps: Steps) -> Steps:
        """As numpy arrays, in every process."""
        return self.model.fetch(steps)

    def wait(self) -> None:
        """Returns when the device has done all it was given."""
        jax.block_until_ready((self._state, self._row, self._table))

    def warm_up(self, tile_counts: Sequence[int], say: Callable[[str], None]) -> None:
        """Runs every program once, so that nothing is compiled later.

        Args:
          tile_counts: of pictures that may come.
          say: is told what is being compiled.
        """
        side, vocab = self.model.config.vision.image_size, self.model.config.language.vocab_size
        for count in sorted({self.tile_bucket(n) for n in tile_counts}):
            say(f"the encoder, {count} tiles")
            self.encode(None, np.zeros((count, side, side, 3), np.uint8))
            self.place(None, 0)
            self.drop_features(None)
        for size in CHUNKS:
            starts = [0, *(n - PAGE for n in self._prefill_lengths if n > PAGE)]
            for start in starts:
                say(f"prefill, {size} tokens from {start}")
                self.prefill(np.zeros(size, np.int32), np.full(size, TEXT_POSITION, np.int32), start, start + size)
        say("pages and slots")
        self.take_page(None, 0)
        self.put_page(None, 0)
        self.drop_page(None)
        prompt = np.zeros(1, np.int32), np.ones(1, np.bool_)
        self.fetch(self.insert(0, *prompt, 1, SamplingParams(), 0, None))
        budget = np.ones(self.slots, np.int32)  # of rows that have ended, so that none takes a step
        mask = np.ones((self.slots, vocab), np.bool_)
        kinds = itertools.product(self.decode_lengths, ((False, None), (True, None), (True, mask)))
        for (length, (top, allowed)), draws in itertools.product(kinds, (False, True)[: 1 + self._asks_here]):
            say(f"decoding, cache of {length}" + (", log-probabilities" if top else "") + (", draws" if draws else ""))
            self._draws[:] = draws
            self.fetch(self.decode(budget, allowed, length, top=top))
        self.reset()
        self.wait()
