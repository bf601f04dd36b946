"""What `dsvl2 serve` does: loads the model, builds the application around the engine, and runs it until it is stopped.

Tested in tests/apps/test_serve.py.
"""

from __future__ import annotations

import dataclasses
import logging
import sys

from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.errors import TokenizerError
from dsvl2_jax.infer.constraints import GrammarCompiler
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.infer.eval.loaded import checkpoint_name
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.infer.serve.app import create_app
from dsvl2_jax.infer.serve.async_engine import AsyncEngine, EngineOptions, follow
from dsvl2_jax.infer.serve.media import Media, MediaOptions
from dsvl2_jax.infer.serve.run import ListenOptions, Server
from dsvl2_jax.infer.serve.state import ServeOptions
from dsvl2_jax.runtime import processes

_BUNDLED = "micro"


def serve(
    ckpt: str | None,
    *,
    loading: LoadOptions,
    engine_options: EngineOptions,
    options: ServeOptions,
    media: MediaOptions,
    listen: ListenOptions,
) -> None:
    """Serves until SIGTERM or Ctrl-C. Prints the address on standard output once requests are answered, nothing else.

    Among several processes all call it; process 0 listens, schedules and prints, the others compute with it.

    Args:
      options: an empty ``model_name`` becomes the checkpoint's.

    Raises:
      DSVL2Error: the checkpoint cannot be used, or the address not be listened at.
    """
    _log_to_standard_error()
    root = _BUNDLED if ckpt is None else checkpoint_name(resolve(ckpt))
    options = dataclasses.replace(options, model_name=options.model_name or root, root=root)
    model = load(ckpt, loading)
    most = engine_options.max_image_tiles
    if most is not None and most < model.processor.config.largest:
        model.processor.set_visuals(most)  # of requests that do not ask, too
    if not processes.is_first():
        follow(model, engine_options, _grammars(model))
        return
    engine = AsyncEngine(model, engine_options)
    app = create_app(engine, options, Media(media, engine.pool), _grammars(model))
    server = Server(
        engine,
        app,
        listen,
        say=_say,
        on_ready=lambda address: print(address, flush=True),
    )
    server.run()


def _grammars(model: Model) -> GrammarCompiler | None:
    try:
        return GrammarCompiler(model.processor.tokenizer, model.config.language.vocab_size)
    except TokenizerError as error:
        if processes.is_first():
            _say(str(error))  # everything else works without it
        return None


def _say(text: str) -> None:
    print(f"dsvl2 serve: {text}", file=sys.stderr, flush=True)


def _log_to_standard_error() -> None:
    """A line for each request and for what goes wrong. The HTTP library tells no more than its warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("dsvl2").addHandler(handler)
    logging.getLogger("dsvl2").setLevel(logging.INFO)
    logging.getLogger("dsvl2").propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
