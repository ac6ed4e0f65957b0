"""Bars that are drawn over and over in the same place: by rich in a terminal, as HTML in a notebook."""

from __future__ import annotations

import atexit
import io
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import rich.console
    from rich.text import Text

    Render = Callable[[int, bool], Text]  # width, whether ASCII alone can be shown

DRAW_INTERVAL_S = 0.2
NOTEBOOK_WIDTH = 130


class Drawing:
    """A thread that draws what `render` gives after each `update`, at most five times a second.

    Without an update nothing is drawn, so a debugger in a training step has the terminal for itself. In a terminal,
    sys.stdout and sys.stderr are replaced until `stop`, so that output goes above the bars.
    """

    def __init__(self, place: str, stream: TextIO, render: Render):
        self._place, self._stream, self._render = place, stream, render
        self._updated, self._stopped = threading.Event(), threading.Event()
        self._replaced: dict[str, PrintedAbove] = {}
        if place == "terminal":
            self._replace_streams()
        own = (id(stream), id(getattr(stream, "stream", stream)))
        self.printed_above = next(
            (above for above in self._replaced.values() if id(above.stream) in own), PrintedAbove(stream)
        )
        atexit.register(self.stop)
        self._thread = threading.Thread(target=self._run, name="raylight-bars", daemon=True)
        self._thread.start()

    def update(self) -> None:
        self._updated.set()

    def stop(self) -> None:
        """Draw a last time, and leave the terminal as it was."""
        atexit.unregister(self.stop)
        self._stopped.set()
        self._updated.set()
        self._thread.join()
        self.printed_above.end()
        for name, above in self._replaced.items():
            above.end()
            if getattr(sys, name) is above:
                setattr(sys, name, above.stream)

    def _replace_streams(self) -> None:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is not None and getattr(sys, name).isatty():
                self._replaced[name] = PrintedAbove(getattr(sys, name))
                setattr(sys, name, self._replaced[name])

    def _run(self) -> None:
        self._updated.wait()
        if self._stopped.is_set():
            return
        bars = TerminalBars(self._stream) if self._place == "terminal" else NotebookBars()
        if isinstance(bars, TerminalBars):
            for above in (self.printed_above, *self._replaced.values()):
                above.begin(bars.console)
        try:
            while not self._stopped.is_set():
                self._updated.wait()
                self._updated.clear()
                bars.draw(self._render)
                self._stopped.wait(DRAW_INTERVAL_S)
            bars.draw(self._render)
        finally:
            bars.stop()


class TerminalBars:
    """Bars at the bottom of a terminal; output through `console` goes above them."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=stream, highlight=False)
        self._ascii_only = not self.console.encoding.startswith("utf")
        self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._live.start()
        self.console.show_cursor(True)  # a killed process could not show it again, so it is never hidden

    def draw(self, render: Render) -> None:
        self._live.update(render(self.console.width, self._ascii_only), refresh=True)

    def stop(self) -> None:
        self._live.stop()


class NotebookBars:
    """Bars in the output of a notebook's cell."""

    def __init__(self) -> None:
        from IPython.display import HTML, display
        from rich.console import Console

        self._html = HTML
        self._console = Console(file=io.StringIO(), record=True, width=NOTEBOOK_WIDTH, force_jupyter=False)
        self._handle: Any = display(HTML(""), display_id=True)

    def draw(self, render: Render) -> None:
        self._console.print(render(NOTEBOOK_WIDTH, False), no_wrap=True, overflow="ellipsis")
        page = self._console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        self._handle.update(self._html(page))

    def stop(self) -> None:
        """Does nothing: the last drawing stays in the cell."""


class PrintedAbove:
    """Stands in for sys.stdout or sys.stderr; while bars are drawn, whole lines go above them.

    A forked process, such as a loader's worker, writes past it: the locks of rich may have been held when it began.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._pid = os.getpid()
        self._console: rich.console.Console | None = None
        self._partial = ""
        self._writing = threading.RLock()  # a signal handler may print in the middle of a print

    @property
    def is_above(self) -> bool:
        """Whether bars are being drawn below."""
        return self._console is not None

    def begin(self, console: rich.console.Console) -> None:
        self._console = console

    def end(self) -> None:
        self._console = None
        partial, self._partial = self._partial, ""
        self.stream.write(partial)
        self.stream.flush()

    def write(self, text: str) -> int:
        console = self._console
        if console is None or os.getpid() != self._pid:
            return self.stream.write(text)
        from rich.text import Text

        with self._writing:
            *lines, rest = (self._partial + text).split("\n")
            self._partial = rest.rpartition("\r")[2]
            if lines:
                console.print(Text.from_ansi("\n".join(lines)), soft_wrap=True)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
