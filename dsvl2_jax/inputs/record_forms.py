"""The keys of a record: which form it has, which keys say nothing to training, and which it must not pass over.

Tested in tests/inputs/test_record_forms.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsvl2_jax.errors import ConversationError
from dsvl2_jax.inputs.tile_budget import BUDGET_KEYS
from dsvl2_jax.inputs.turns import ROLES, SWITCHES, says_nothing
from dsvl2_jax.inputs.visuals import VIDEO_KEYS

TURNS = ("messages", "conversations", "conversation")
# (question, what is appended to it, answer)
_PAIRS = (
    ("instruction", "input", "output"),
    ("query", None, "response"),
    ("question", None, "answer"),
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
)
_SYSTEM = ("system", "system_prompt")

# Keys that say where a record comes from or how good it is, and nothing that training could learn. "regions" are the
# encoder's own training's (docs/data.md).
_HARMLESS_NAMES = """
    id ids uid uuid idx index key hash md5 sha256 sample_id question_id conversation_id prompt_id image_id doc_id
    source sources data_source source_id dataset dataset_name dataset_id subset split origin url urls image_source
    file file_name filename path category categories subcategory domain topic topics task task_type task_name type tags
    lang language languages license licence license_url author annotator score scores quality rating difficulty level
    metadata meta info extra extra_info model model_name generator version timestamp date created created_at updated_at
    width height image_size image_width image_height num_turns num_tokens n_tokens token_count length
    comment comments note notes regions __key__ __url__ __index_level_0__
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
# Keys with which a record says that something else is to be learnt than its text.
_REFUSED = {
    "a preference between answers": "rejected_response rejected rejected_messages rejected_images chosen "
    "chosen_response margin kto_tag positive_messages negative_messages positive negative",
    "a class or a score of the answer": "label labels",
    "tools": "tools functions tool_calls function_call tool_call_id",
    "sound": "audio audios",
    "reasoning beside the answer": "reasoning reasoning_content thinking",
    "a loss on parts of a text": "train_detail training_detail labels_mask loss_mask mask",
}
# Where other tools have the image itself.
_IMAGE_KEYS = ("image_url", "image_path", "image_paths", "image_file", "img", "img_path")
_REFUSED_KEYS = {key: what for what, keys in _REFUSED.items() for key in keys.split()}


class Form(NamedTuple):
    """The turns of a record, or its text, as they were written."""

    key: str  # the first key of the form, for messages
    used: frozenset[str]
    turns: Sequence[Any] | None = None
    text: str | None = None


def read_form(record: Mapping[str, Any]) -> Form:
    """The form of a record: the first that it has of turns, of a question and its answer, and of text.

    Raises ConversationError, saying what was found and expected.
    """
    keys = [key for key in TURNS if not says_nothing(record.get(key))]
    if len(keys) > 1:
        raise ConversationError(f'has turns twice, under "{keys[0]}" and "{keys[1]}". Leave one of them out.')
    if keys or any(record.get(key) is not None for key in TURNS):
        key = keys[0] if keys else next(key for key in TURNS if record.get(key) is not None)
        turns = _turns(record[key], key)
        return Form(key, frozenset({key, *_SYSTEM}), _with_system(record, turns))
    for question, more, answer in _PAIRS:
        if record.get(question) is not None and record.get(answer) is not None:
            asked, given = _text(record, question), _text(record, answer)
            if more and not says_nothing(record.get(more)):
                asked = f"{asked}\n{_text(record, more)}"
            turns = [*_history(record), _turn("user", asked), _turn("assistant", given)]
            used = {question, answer, "history", *_SYSTEM} | ({more} if more else set())
            return Form(question, frozenset(used), _with_system(record, turns))
    text = record.get("text")
    if not isinstance(text, str):
        found = (
            f'"text" of type {type(text).__name__}'
            if text is not None
            else ", ".join(sorted(map(str, record))) or "nothing"
        )
        pairs = ", ".join(f'"{question}" with "{answer}"' for question, _, answer in _PAIRS)
        raise ConversationError(f'expected "messages", "conversations" or "text", or {pairs}; found {found}.')
    if any(not says_nothing(record.get(key)) for key in _SYSTEM):
        raise ConversationError('has a system message beside "text", which is learnt as it stands. Put it in front.')
    return Form("text", frozenset({"text"}), text=text)


def unused_keys(record: Mapping[str, Any], form: Form) -> tuple[str, ...]:
    """The keys of a record that say something, and nothing that training uses or may pass over.

    Raises ConversationError for a key with which training would learn something else than the record says.
    """
    known = {*form.used, "images", "image", "videos", "video", "objects", *SWITCHES, *VIDEO_KEYS, *BUDGET_KEYS}
    rest = [str(key) for key, value in record.items() if key not in known and not says_nothing(value)]
    refuse(rest, "")
    elsewhere = [key for key in rest if key in _IMAGE_KEYS]
    if elsewhere and all(says_nothing(record.get(key)) for key in ("images", "image")):
        raise ConversationError(f'has its image under "{elsewhere[0]}". Name the key "image", or remove it.')
    return tuple(key for key in rest if key not in _HARMLESS)


def refuse(keys: Sequence[str], label: str) -> None:
    """Raises ConversationError, which begins with `label`, if one of a record's or turn's keys changes its meaning."""
    for key in keys:
        # Of a part of a turn's content the last name counts.
        what = _REFUSED_KEYS.get(key.rpartition(".")[2])
        if what is not None:
            raise ConversationError(
                f'{label}"{key}" stands for {what}, which this training does not learn: it would learn the text as if '
                "the key were not there. Remove the key if that is what you want."
            )


def _turn(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


def _turns(value: Any, key: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConversationError(f'"{key}" is {type_name(value)}, expected a list of one or more turns.')
    turns: list[Any] = []
    for turn in value:
        # Rounds of a conversation, as some tools write them.
        if isinstance(turn, Mapping) and set(turn) == {"human", "assistant"}:
            turns += [_turn("user", turn["human"]), _turn("assistant", turn["assistant"])]
        else:
            turns.append(turn)
    return turns


def _history(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rounds = record.get("history")
    if says_nothing(rounds):
        return []
    expected = 'expected a list of [question, answer], as in [["Hello", "Hi"]].'
    if not isinstance(rounds, list | tuple):
        raise ConversationError(f'"history" is {type_name(rounds)}, {expected}')
    turns = []
    for number, pair in enumerate(rounds, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ConversationError(f'"history": number {number} is {str(pair)[:60]}, {expected}')
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    return turns


def _with_system(record: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """The turns after the system message that stands beside them, if there is one."""
    found = [key for key in _SYSTEM if not says_nothing(record.get(key))]
    if not found:
        return turns
    text = _text(record, found[0])
    first = turns[0] if isinstance(turns[0], Mapping) else {}
    role = first.get("role", first.get("from"))
    doubled = isinstance(role, str) and ROLES.get(role.strip().lower()) == "system"
    if len(found) == 1 and doubled and text in (first.get("content"), first.get("value")):
        return turns
    if len(found) > 1 or doubled:
        other = f'"{found[1]}"' if len(found) > 1 else "the first turn"
        raise ConversationError(f'has two system messages, "{found[0]}" and {other}. Leave one of them out.')
    return [_turn("system", text), *turns]


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise ConversationError(f'"{key}" is {type_name(record[key])}, expected a text.')
    return record[key]


def type_name(value: Any) -> str:
    """What a JSON value is, for messages: "an object", "a list", …"""
    return {dict: "an object", list: "a list", str: "a string", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )
