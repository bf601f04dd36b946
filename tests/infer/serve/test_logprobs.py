"""Log-probabilities as OpenAI's endpoints write them."""

from __future__ import annotations

from dsvl2_jax.infer.request import Delta
from dsvl2_jax.infer.serve.logprobs import content, legacy


def test_tokens_joined_are_the_text_and_eos_has_no_entry(micro):
    tokenizer = micro.processor.tokenizer
    text = "ré漢 x"
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    values = [-0.5] * (len(ids) - 1) + [float("-inf")]
    entries = content(
        tokenizer, Delta(text, ids, values, [[(ids[0], -0.5), (ids[1], float("-inf"))]] * len(ids), "stop")
    )
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    assert len(entries) == len(ids) - 1
    assert entries[0]["top_logprobs"][1]["logprob"] == -9999.0  # JSON has no infinity
    assert content(tokenizer, Delta(text, ids, values, [], "stop"))[0]["top_logprobs"] == []
    assert content(tokenizer, Delta(text, ids, [], [], "stop")) == []


def test_offsets_count_characters_of_the_answer():
    entries = [
        {"token": t, "logprob": -1.0, "top_logprobs": [{"token": "z", "logprob": -2.0}]} for t in ("ab", "", "c")
    ]
    written = legacy(entries, 10)
    assert written["text_offset"] == [10, 12, 12] and written["tokens"] == ["ab", "", "c"]
    assert written["top_logprobs"][0] == {"z": -2.0} and written["token_logprobs"] == [-1.0] * 3
