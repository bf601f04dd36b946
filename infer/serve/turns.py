"""The turns of all processes that share a model: process 0 says what has come, and all of them do the same.

Every process has a scheduler of its own, whose decisions follow from what it is told alone. While there is nothing to
do, the others wait at jax's coordination service, outside the devices' collectives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.infer.constraints import GrammarCompiler
from dsvl2_jax.infer.request import Request
from dsvl2_jax.infer.scheduler import Event, Scheduler, Ticket
from dsvl2_jax.runtime import processes


@dataclasses.dataclass(frozen=True)
class Word:
    """One thing that came: a request, or with ``request`` None, that one is not wanted any more."""

    number: int  # of the request
    request: Request | None = None


class Turns:
    """A scheduler that is told what to do by numbers, which mean the same in every process."""

    def __init__(self, scheduler: Scheduler, grammars: GrammarCompiler | None = None):
        """``grammars`` makes those again that process 0 has made; None in process 0."""
        self.scheduler = scheduler
        self.grammars = grammars
        self.tickets: dict[int, Ticket] = {}  # that have not ended
        self._round = 0  # of waking the others

    def make(self, words: Sequence[Word]) -> Iterator[list[tuple[int, Event]]]:
        """One turn in every process; called in process 0 when there is something to do, and to be followed to its end.

        Yields:
          (number of the request, event) of what has arrived, as soon as it has.
        """
        if self.scheduler.idle:
            self._round += 1
            processes.wake(self._round)
        processes.from_first(lambda: list(words))
        yield from self._turn(words)

    def reset(self, error: DSVL2Error) -> list[tuple[int, Event]]:
        """After a failure of the device, of one process that is alone; see `Scheduler.reset`."""
        return self._told(self.scheduler.reset(error))

    def end(self) -> None:
        """Lets the other processes end."""
        if self.scheduler.idle:
            processes.wake(self._round + 1)
        processes.from_first(lambda: None)

    def follow(self) -> None:
        """What the other processes do, until process 0 has ended."""
        while True:
            if self.scheduler.idle:
                self._round += 1
                processes.wait_to_be_woken(self._round)
            words = processes.from_first(list)
            if words is None:
                return
            for word in words:
                if word.request is not None and word.request.grammar is not None:
                    object.__setattr__(word.request, "grammar", self.grammars.again(word.request.grammar))
            for _ in self._turn(words):
                pass

    def _turn(self, words: Sequence[Word]) -> Iterator[list[tuple[int, Event]]]:
        for word in words:
            if word.request is not None:
                self.tickets[word.number] = self.scheduler.submit(word.request)
            elif (ticket := self.tickets.pop(word.number, None)) is not None:
                self.scheduler.cancel(ticket)
        for events in self.scheduler.advance():
            yield self._told(events)

    def _told(self, events: Sequence[Event]) -> list[tuple[int, Event]]:
        """Events with the numbers of their requests."""
        numbers = {ticket: number for number, ticket in self.tickets.items()}
        events = [(numbers[ticket], (ticket, delta)) for ticket, delta in events if ticket in numbers]
        for number, (_, delta) in events:
            if delta is None or delta.finish_reason is not None:
                self.tickets.pop(number, None)
        return events
