"""Ctrl-C and SIGTERM as a request to stop after the step."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While active, SIGINT and SIGTERM only set `received`.

    A second Ctrl-C interrupts at once, unless `patient`: torchrun passes each Ctrl-C on, so that
    its processes see it twice.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.received = 0
        self._patient = patient
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received and not self._patient:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
