"""Stores against a plain list of what was used last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsvl2_jax.infer.stores import Store


@given(st.integers(0, 30), st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 12), st.booleans())))
def test_what_was_used_least_lately_goes_out_first(capacity, steps):
    dropped: list[str] = []
    store, kept = Store(capacity, dropped.append), []  # kept: (key, size), the least lately used first
    for key, size, forget in steps:
        if forget:
            assert store.forget(key) == (key in dict(kept))
            kept = [entry for entry in kept if entry[0] != key]
            continue
        hits = store.hits
        if store.touch(key):
            entry = next(entry for entry in kept if entry[0] == key)
            kept.remove(entry)
            kept.append(entry)
            assert store.hits == hits + 1
        elif store.make_room(key, size):
            kept.append((key, size))
            while sum(size for _, size in kept) > capacity:
                assert dropped[-len(kept) :]
                kept.pop(0)
        else:
            assert size > capacity
        assert [key for key, _ in kept] == list(store._sizes)
        assert store.size == sum(size for _, size in kept) <= capacity
    store.clear()
    assert len(store) == store.size == 0


def test_each_key_that_goes_out_is_dropped_once():
    dropped: list[str] = []
    store = Store(10, dropped.append)
    for key in "abcd":
        assert store.make_room(key, 4)
    assert dropped == ["a", "b"]
    assert not store.make_room("large", 11)
    assert dropped == ["a", "b"]
    assert "c" in store and "a" not in store
