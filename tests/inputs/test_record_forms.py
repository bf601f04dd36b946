"""Every key of a record is used, known to say nothing, or told; each form gives the input of the plain one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl2_jax import configs
from dsvl2_jax.errors import SampleError
from dsvl2_jax.inputs.image_sources import FolderImages
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.record_forms import _HARMLESS, _REFUSED_KEYS, TURNS
from dsvl2_jax.inputs.records import NO_LOSS, parse_record, process, resolve
from dsvl2_jax.inputs.turns import SWITCHES

CONFIGS = Path(configs.__file__).parent


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_dir(CONFIGS / "micro")


def read(processor: Processor, record: dict, mask_prompt: bool = True) -> ModelInputs:
    store = FolderImages(str(CONFIGS / "images"))
    return process(resolve(parse_record(record), processor, store), processor, mask_prompt)


def messages(*texts: str, system: str | None = None, **more: object) -> dict:
    """User and assistant in turn, after a system turn."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns} | more


LLAVA = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A"}]
CHART = {"images": ["chart.png"]}
FORMS = [
    ({"conversations": LLAVA, "system": "Answer briefly."}, messages("What?", "A", system="Answer briefly.")),
    (messages("What?", "A") | {"system_prompt": "Be brief."}, messages("What?", "A", system="Be brief.")),
    (messages("What?", "A", system="Be brief.") | {"system": "Be brief."}, messages("What?", "A", system="Be brief.")),
    (
        {"conversation": [{"human": "What?", "assistant": "A"}, {"human": "B", "assistant": "C"}]},
        messages("What?", "A", "B", "C"),
    ),
    ({"instruction": "<image>What?", "input": "", "output": "A", **CHART}, messages("<image>What?", "A", **CHART)),
    ({"instruction": "Add.", "input": "1 2", "output": "3", "system": "S"}, messages("Add.\n1 2", "3", system="S")),
    (
        {"query": "<image>What?", "response": "A", "history": [["Hello", "Hi"]], **CHART},
        messages("Hello", "Hi", "<image>What?", "A", **CHART),
    ),
    (
        {"query": "What?", "response": "A", "system": "S", "history": [], "tools": None},
        messages("What?", "A", system="S"),
    ),
    ({"instruction": "B", "output": "C", "history": [["What?", "A"]]}, messages("What?", "A", "B", "C")),
    ({"question": "What?", "answer": "A", "image": "chart.png", "id": 7}, messages("What?", "A", **CHART)),
    ({"prompt": "What?", "completion": "A", "messages": None, "text": ""}, messages("What?", "A")),
]


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize(("record", "plain"), FORMS)
def test_every_form_gives_the_tokens_of_the_plain_one(processor, record, plain, mask_prompt):
    found, expected = read(processor, record, mask_prompt), read(processor, plain, mask_prompt)
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.labels.tolist() == expected.labels.tolist()
    assert np.array_equal(found.tiles, expected.tiles)
    assert parse_record(record).unused == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (messages("What?", "A", rejected_response="B"), '"rejected_response" stands for a preference between answers'),
        (messages("What?", "A", label=False), '"label" stands for a class'),
        (messages("What?", "A", tools="[{}]"), '"tools" stands for tools'),
        (messages("What?", "A", audios=["a.mp3"]), '"audios" stands for sound'),
        ({"messages": [LLAVA[0], {**LLAVA[1], "tool_calls": [{}]}]}, r'turn 2 \(assistant\): "tool_calls"'),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "audio": "b"}]}, LLAVA[1]]}, "audio"),
        (messages("What?", "A", image_path="a.png"), 'has its image under "image_path"'),
        (messages("What?", "A", images=["a.png"], image="b.png"), '"images" and "image" are both given'),
        (messages("What?", "A", system="S") | {"system": "T"}, "two system messages"),
        (messages("What?", "A") | {"system": "T", "system_prompt": "S"}, "two system messages"),
        (messages("What?", "A") | {"system": ["T"]}, '"system" is a list'),
        ({"text": "A", "system": "S"}, 'a system message beside "text"'),
        (messages("What?", "A") | {"conversations": LLAVA}, 'turns twice, under "messages" and "conversations"'),
        ({"instruction": "What?", "output": ["A", "B"]}, '"output" is a list'),
        ({"query": "What?", "response": "A", "history": ["Hello"]}, '"history": number 1 is Hello'),
        ({"query": "What?", "response": "A", "history": "Hello"}, '"history" is a string'),
        (messages("What?", "A", weight=0.5), 'the record: "weight" is 0.5'),
        (messages("What?", "A", loss=True, weight=0), "loss and weight contradict"),
        (messages("What?", "A", loss="no"), 'the record: "loss" is no'),
    ],
)
def test_what_training_would_learn_otherwise_is_a_broken_record(processor, record, message):
    with pytest.raises(SampleError, match=message) as error:
        read(processor, record)
    assert error.value.reason == "record"


def test_keys_without_a_use_are_told_by_their_places():
    record = messages("What?", "A", mood="merry", id=3, empty=[]) | {"text": "also here"}
    record["messages"][0] |= {"speaker": 1}
    record["messages"][1] |= {
        "content": [{"type": "text", "text": "A", "bold": True}, {"type": "text", "text": "B", "bold": 1}]
    }
    assert parse_record(record).unused == ("mood", "text", "messages[].speaker", "messages[].content[].bold")


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize(
    "switch", [{key: value} for key, value in zip(SWITCHES, [False, 0, False, 0.0, 0, False], strict=True)]
)
def test_a_turn_whose_switch_is_off_has_no_loss(processor, switch, mask_prompt):
    record = messages("What?", "A.", "Sure?", "Yes.")
    everything = read(processor, record, mask_prompt)
    record["messages"][1] |= switch
    found = read(processor, record, mask_prompt)
    assert found.input_ids.tolist() == everything.input_ids.tolist()
    lost = (found.labels != everything.labels).nonzero()[0]
    eos = processor.tokenizer.eos_token
    assert processor.tokenizer.decode(found.input_ids[lost]) == f"A.{eos}" and (found.labels[lost] < 0).all()
    record["messages"][2] |= {"loss": False}
    learnt = read(processor, record, mask_prompt).labels[1:]
    learnt = processor.tokenizer.decode(learnt[learnt >= 0])
    assert learnt.endswith(f"Yes.{eos}") and "Sure" not in learnt and ("What" in learnt) is not mask_prompt


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_record_whose_switch_is_off_is_left_out(processor, mask_prompt):
    for record in (messages("What?", "A.", loss=False), {"text": "A.", "weight": 0}):
        with pytest.raises(SampleError) as error:
            read(processor, record, mask_prompt)
        assert error.value.reason == NO_LOSS
    assert (read(processor, messages("What?", "A.", loss=True, weight=1)).labels >= 0).any()


USED = (
    *TURNS,
    "instruction",
    "input",
    "output",
    "query",
    "response",
    "question",
    "answer",
    "prompt",
    "completion",
    "text",
)
BESIDE = ("system", "system_prompt", "history", "images", "image", "objects", *SWITCHES)
KEYS = [*USED, *BESIDE, "role", "content", "from", "value", "ref", "bbox", "id", "label", "type", "strange"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "Assistant", "system"]), "content": st.text(max_size=5)},
    optional={"loss": VALUES, "strange": VALUES, "id": VALUES, "tool_calls": VALUES},
)
RECORDS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES, max_size=5) | st.fixed_dictionaries(
    {"messages": st.lists(TURN, max_size=3)},
    optional={"strange": VALUES, "weight": VALUES, "label": VALUES, "system": st.text(max_size=3), "id": VALUES},
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(RECORDS | VALUES)
def test_any_object_is_read_or_refused_and_no_key_is_passed_over(record):
    try:
        parsed = parse_record(record)
    except SampleError:
        return
    saying = {
        key for key, value in record.items() if value is not None and (value == 0 or bool(value) or value is False)
    }
    left = saying - _HARMLESS - set(parsed.unused)
    assert not left & set(_REFUSED_KEYS)
    # What is left over are the keys of the form that it has, and those that stand beside every form.
    assert left <= {*USED, *BESIDE}
    for turn in record.get("messages") or []:
        if parsed.conversation is not None and isinstance(turn, dict) and turn.get("strange") not in (None, "", [], {}):
            assert "messages[].strange" in parsed.unused
