"""Console: the terminal, the notebook or the log file that a person watches a run in."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from raylight.contract.messages import Message, Notice, Output, Progress
from raylight.contract.plain_text import visible
from raylight.report.bars import describe, label, render
from raylight.report.drawing import Drawing
from raylight.report.output_streams import LastingStream
from raylight.report.progress import RunProgress
from raylight.report.summary import format_results, summarize_model, summarize_result

if TYPE_CHECKING:
    from rich.text import Text

    from raylight.driver.result import Result

LINE_INTERVAL_S = 5.0


class Console:
    """Shows messages of all ranks: as bars in a terminal or a notebook, elsewhere as a plain line every few seconds.

    `enabled=False` leaves out bars, lines and the summary; the output of rank 0 and notices still appear. Bars are
    drawn by a thread, which imports rich once the first batch is through.
    """

    def __init__(
        self,
        enabled: bool = True,
        stream: TextIO | None = None,
        world_size: int = 1,
        max_epochs: int | None = None,
        max_steps: int = -1,
        max_time_s: float | None = None,
    ):
        self.enabled = enabled
        self.world_size = world_size
        stream = sys.stdout if stream is None else stream
        self._stream: Any = stream if isinstance(stream, LastingStream) else LastingStream(stream)
        self._place = find_place(self._stream)
        self._progress = RunProgress(max_epochs, max_steps, max_time_s)
        self._lock = threading.RLock()  # a signal handler may have something to say in the middle of a message
        self._said: dict[str, int] = {}
        self._began = time.monotonic()
        self._next_line: float | None = None
        self._drawing: Drawing | None = None
        self._log = _LogHandler(self)
        if not logging.getLogger().handlers:  # otherwise the program has configured logging
            logging.getLogger("raylight").addHandler(self._log)

    def handle(self, rank: int, message: Message) -> None:
        if isinstance(message, Output):
            if rank == 0:
                self._write(message.text)
        elif isinstance(message, Notice):
            self._say(rank, message)
        elif self.enabled:
            with self._lock:
                self._progress.handle(rank, message, time.monotonic())
            if self._place != "plain":
                self._draw()
            elif isinstance(message, Progress):
                self._print_line()

    def show_model(self, module: Any) -> None:
        """Show the table of layers; nothing if the module has none yet."""
        if any(True for _ in module.children()):
            self._write(summarize_model(module) + ("\n" if self._place == "plain" else "\n\n"))

    def show_results(self, stage: str, results: Sequence[Mapping[str, float]]) -> None:
        """Show the results of `validate` or `test`."""
        if any(results):
            self._write(format_results(stage, results) + "\n")

    def close(self, result: Result | None = None, with_tensorboard: bool = True) -> None:
        """Put the terminal back as it was and, if there is a result, print its summary. May be called again."""
        logging.getLogger("raylight").removeHandler(self._log)
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.stop()
        if result is not None and self.enabled:
            seconds = time.monotonic() - self._began
            self._write("\n" + summarize_result(result, seconds, with_tensorboard) + "\n")

    def _draw(self) -> None:
        if self._drawing is None:
            self._drawing = Drawing(self._place, self._stream, self._render)
        if self._progress.has_begun:
            self._drawing.update()

    def _render(self, width: int, ascii_only: bool) -> Text:
        with self._lock:
            return render(self._progress, time.monotonic(), width, ascii_only)

    def _print_line(self) -> None:
        now = time.monotonic()
        if self._next_line is None:
            self._next_line = now + LINE_INTERVAL_S
        if now < self._next_line:
            return
        self._next_line = now + LINE_INTERVAL_S
        parts: list[str] = []
        for stage, facts in describe(self._progress, now):
            parts += [f"{label(self._progress, stage)} {facts[0]}", *facts[1:]]
        self._write(", ".join(parts) + "\n")

    def _say(self, rank: int, notice: Notice) -> None:
        """Shows a notice; once if several ranks send the same."""
        if self._said.setdefault(notice.text, rank) != rank:
            return
        mark = "warning: " if notice.level == "warning" else ""
        lead = "raylight: " if mark or "\n" not in notice.text else ""
        text = visible(notice.text, keep="\n\t")
        self._write(f"{lead}{mark}{text}\n")

    def _write(self, text: str) -> None:
        """Prints above the bars, if there are any."""
        stream = self._drawing.printed_above if self._drawing is not None else self._stream
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            stream.write(text.replace("─", "-").encode(encoding, "replace").decode(encoding))
        stream.flush()


class _LogHandler(logging.Handler):
    """Log records of raylight in the driver's process, such as why storage is tried again, printed above the bars."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.handle(0, Notice(record.getMessage(), "warning"))


def find_place(stream: TextIO | LastingStream) -> str:
    """The kind of `stream`: "terminal", "notebook" or "plain"."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if type(shell).__name__ in ("ZMQInteractiveShell", "Shell"):  # Jupyter's, Colab's
        return "notebook"
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return "terminal"
    return "plain"
