"""Signals that end a run: what is trained is saved first, a second signal ends it at once."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

log = logging.getLogger(__name__)
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(BaseException):
    """The run ends because of a signal. Not an Exception: nothing on the way out takes it for a fault."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Turns signals into a request to save and stop, while it is entered.

    Before the loop there is nothing to save, and a signal raises :class:`Interrupted` at once. After :meth:`hold`, a
    signal only sets :attr:`requested`, and whoever trains saves and calls :meth:`raise_requested`. A thread looks at
    the clock and for a second signal, because the main thread may be inside a compilation or a step: both end the
    process on the spot, which loses what was not saved, and damages nothing.

    Handlers that were there before (such as a launcher's, to queue the job anew) are called after the run has saved;
    for SIGTERM, which such launchers choose to ignore, they are left in place. Ignored signals stay ignored.
    """

    def __init__(self, grace_seconds: float):
        self.requested: int | None = None
        self.is_holding = False
        self._grace_seconds = grace_seconds
        self._previous: dict[int, Any] = {}
        self._descriptor = -1
        self._pair: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread alone: there its owner decides
        for number in HANDLED:
            previous = signal.getsignal(number)
            is_foreign = callable(previous) and previous is not signal.default_int_handler
            if previous is signal.SIG_IGN or (number == signal.SIGTERM and is_foreign):
                continue
            self._previous[number] = previous
            signal.signal(number, self._handle)
        self._pair = receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(receiver,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pair is None:
            return
        signal.set_wakeup_fd(self._descriptor)
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        receiver, sender = self._pair
        sender.close()  # ends the thread
        self._thread.join()
        receiver.close()

    def renew(self) -> None:
        """Takes the signals again, after a library has taken them (jax's coordination of processes takes SIGTERM)."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def hold(self) -> None:
        """From here on there is something to save."""
        self.raise_requested()
        self.is_holding = True

    def release(self) -> None:
        """From here on there is nothing more to save."""
        self.is_holding = False
        self.raise_requested()

    def raise_requested(self) -> None:
        """Raises :class:`Interrupted` if a signal has come."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def call_previous(self, number: int) -> None:
        """Calls the handler that a launcher had set for this signal, if any."""
        previous = self._previous.get(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            if not self.is_holding:
                raise Interrupted(number)

    def _watch(self, receiver: socket.socket) -> None:
        first = self._receive(receiver, None)
        if first is None:
            return
        words = "saving, then stopping; a second signal stops at once" if self.is_holding else "stopping"
        log.warning("%s: %s", signal.Signals(first).name, words)
        try:
            second = self._receive(receiver, self._grace_seconds)
        except TimeoutError:
            log.warning("not saved within checkpoint.grace_seconds=%g: stopped without", self._grace_seconds)
            _leave(first)
        if second is not None:
            log.warning("%s again: stopped at once, nothing more is saved", signal.Signals(second).name)
            _leave(first)

    def _receive(self, receiver: socket.socket, timeout: float | None) -> int | None:
        """The next signal that is ours; None when this object is left."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            receiver.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
            received = receiver.recv(1)
            if not received or received[0] in self._previous:
                return received[0] if received else None


def _leave(number: int) -> NoReturn:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the cursor, which the progress bar hides
    os._exit(128 + number)
