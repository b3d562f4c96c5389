"""Ctrl-C: a run ends after the current epoch, never inside a compiled program."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130

Asked = Callable[[], bool]
"""Whether the user has asked the run to stop."""


@contextlib.contextmanager
def asked_to_stop(say: Callable[[str], None], promise: str) -> Iterator[Asked]:
    """Lets the first SIGINT or SIGTERM set a flag; the second one ends the process at once.

    By default Python raises ``KeyboardInterrupt`` anywhere. A compiled program would then still run
    while the interpreter exits, which ends in a segmentation fault.

    Args:
      say: called with a message after the first signal.
      promise: the start of that message, which says when the run will end.

    Yields:
      A function that returns whether to stop. Call it wherever stopping is safe.
    """
    asked = threading.Event()
    stopping = (signal.SIGINT, signal.SIGTERM)
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    # Python's handlers wait until the compiled program ends; this thread does not.
    def listen() -> None:
        while received := reader.recv(1):
            if received[0] not in stopping:
                continue
            if asked.is_set():
                leave_at_once()
            asked.set()
            say(f"{promise}; press Ctrl-C again to stop at once")

    thread = threading.Thread(target=listen, daemon=True)
    before = {number: signal.signal(number, ignore) for number in stopping}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield asked.is_set
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


@contextlib.contextmanager
def nothing_to_lose(undo: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Lets SIGINT end the process at once, for the time of imports and of reading data.

    Inside a callback, such as one of the garbage collector, Python would print the
    ``KeyboardInterrupt`` and continue.

    Args:
      undo: called before the process ends.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        # the step to undo may be half done
        with contextlib.suppress(Exception):
            undo()
        os.write(2, b"gradxform: interrupted\n")
        leave_at_once()

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave_at_once() -> None:
    """Ends the process without the usual exit of the interpreter, which does not wait for JAX."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar has hidden the cursor
    os._exit(INTERRUPTED)
