"""One answer on the host: from tokens to text, stop strings and boxes."""

from __future__ import annotations

import dataclasses

import numpy as np

from dsvl2_jax.infer.sampling import SamplingParams
from dsvl2_jax.inputs.grounding import Box, count_malformed_boxes, parse_boxes
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.tokenizer import StreamDecoder


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      token_ids: the answer's tokens, the ending eos included.
      text: the answer; special tokens are kept (boxes need them), the ending eos is not.
      finish_reason: "stop" (eos or a stop string) or "length".
      boxes: grounding boxes in pixels of the conversation's last image.
      malformed_boxes: how many more the model wrote that are none; see `count_malformed_boxes`.
      logprobs: the model's log-probability of each token, or None when not asked for.
      prompt_tokens, image_tokens: length of the prompt, and how many of its tokens are image rows.
      tiles: of the prompt's images, global views included.
      drafted_tokens, accepted_tokens: with speculation, how many tokens were proposed, and were right.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    boxes: list[Box]
    logprobs: list[float] | None
    prompt_tokens: int
    image_tokens: int
    malformed_boxes: int = 0
    tiles: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class AnswerBuilder:
    """A growing answer on the host: its tokens, its text, its stop strings, and how much of the text was shown."""

    def __init__(self, processor: Processor, sampling: SamplingParams):
        self.decoder = StreamDecoder(processor.tokenizer)
        self.stop_strings = sampling.stop
        self.eos = processor.tokenizer.eos_id
        self.ignore_eos = sampling.ignore_eos
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.stopped = False
        self.cut = False  # at a stop string
        self.shown = 0

    def extend(self, tokens: np.ndarray, logprobs: np.ndarray) -> str:
        """Adds tokens; returns the text to show now: no incomplete character, no beginning of a stop string."""
        for token, value in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            if self.stopped:
                break
            self.tokens.append(token)
            self.logprobs.append(value)
            if token == self.eos:
                self.stopped = not self.ignore_eos
            else:
                self._add_text(self.decoder.push(token))
        held = 0 if self.stopped else max((_overlap(self.text, s) for s in self.stop_strings), default=0)
        return self._show(len(self.text) - held)

    def finish(self) -> str:
        """Ends the answer; returns the text held back so far."""
        if not self.cut:
            self._add_text(self.decoder.flush())
        return self._show(len(self.text))

    def _add_text(self, new: str) -> None:
        longest = max(map(len, self.stop_strings), default=0)
        start = max(0, len(self.text) - longest)
        self.text += new
        cuts = [at for at in (self.text.find(s, start) for s in self.stop_strings) if at >= 0]
        if cuts:
            self.text, self.stopped = self.text[: min(cuts)], True
            self.cut = True

    def _show(self, end: int) -> str:
        new, self.shown = self.text[self.shown : end], max(self.shown, end)
        return new

    def generation(self, prompt: ModelInputs, with_logprobs: bool) -> Generation:
        return Generation(
            token_ids=self.tokens,
            text=self.text,
            finish_reason="stop" if self.stopped else "length",
            boxes=parse_boxes(self.text, prompt.image_sizes),
            logprobs=self.logprobs if with_logprobs else None,
            prompt_tokens=len(prompt.input_ids),
            image_tokens=int(prompt.image_mask.sum()),
            malformed_boxes=count_malformed_boxes(self.text),
            tiles=len(prompt.tiles),
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
