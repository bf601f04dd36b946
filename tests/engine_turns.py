"""Requests that a scheduler answers, turn by turn, and what became of them."""

from __future__ import annotations

from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.scheduler import Scheduler, Ticket


def run(engine: Scheduler, requests: list[Request], arrive=lambda: True) -> list[Ticket]:
    """Submits requests, each in a turn in which ``arrive`` says so, and makes turns until all have ended."""
    tickets, left = [], list(requests)
    while left or not engine.idle:
        while left and arrive():
            tickets.append(engine.submit(left.pop(0)))
        engine.turn()
    return tickets


def result(ticket: Ticket):
    assert ticket.done and ticket.error is None
    return ticket.answer.tokens, ticket.answer.logprobs, ticket.answer.text, ticket.answer.stopped
