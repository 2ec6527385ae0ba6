"""The one output object: stdout is data, stderr is talk.

``NO_COLOR`` is honoured, colour and progress bars appear on a terminal only, and rich is imported
only when something needs it. Streams are looked up at each call, so that a redirect is followed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from moectl.errors import MoectlError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

PLAIN_LINE_EVERY_S = 5.0
PIPED_WIDTH, UNWRAPPED = 120, 10_000
_NOTHING = "–"
_STYLES = {"warning": "bold yellow", "error": "bold red", "hint": "cyan"}


def to_jsonable(value: Any) -> Any:
    """``value`` as JSON types: NaN and infinities become the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

    Takes mappings, sequences, sets (sorted), pydantic models, NamedTuples (as objects), numpy and
    torch scalars and arrays; anything else (paths, dates, enums) becomes its text.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if hasattr(value, "model_dump"):
        return to_jsonable(value.model_dump())
    if hasattr(value, "_asdict"):
        return to_jsonable(value._asdict())
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [to_jsonable(item) for item in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    return str(value)


class Bar:
    """A running count of work, shown on stderr; made by :meth:`Output.progress`.

    Callable, so that it can be handed to a service as its ``progress`` callback.
    """

    def __init__(self, output: Output, label: str, total: float | None, rich_progress: Progress | None) -> None:
        self._output = output
        self._label = label
        self._total = total
        self._done = 0.0
        self._note = ""
        self._rich = rich_progress
        self._task = rich_progress.add_task(label, total=total, note="") if rich_progress else None
        self._started = self._last_line = time.monotonic()

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """Set the work done so far, the total when it has become known, and a short note."""
        self._done = done
        self._total = total if total is not None else self._total
        self._note = note or self._note
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=done, total=self._total, note=self._note)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._line()

    __call__ = update

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """Add to the work done."""
        self.update(self._done + by, note=note)

    def describe(self, label: str) -> None:
        """Change the label, for work in phases."""
        self._label = label
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, description=label)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        count = f"{self._done:,.0f}" + (f"/{self._total:,.0f}" if self._total else "")
        note = f" · {self._note}" if self._note else ""
        self._output.say(f"{self._label} {count} · {self._last_line - self._started:.0f} s{note}")


class Output:
    """Everything a command says goes through here."""

    def __init__(self) -> None:
        self._live: Progress | None = None

    # data: stdout

    def data(self, obj: Any) -> None:
        """Write text as it is, and anything else as one JSON document."""
        text = obj if isinstance(obj, str) else json.dumps(to_jsonable(obj), indent=2, ensure_ascii=False)
        sys.stdout.write(text if text.endswith("\n") else text + "\n")

    def stream(self, text: str) -> None:
        """Write a piece of text as it is, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def table(
        self,
        title: str | None,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        *,
        caption: str | None = None,
    ) -> None:
        """Print a table to stdout, title and caption on lines of their own. A column of numbers is set to the right.

        None shows as "–"; format numbers before handing them over, if their digits matter.
        Off a terminal, nothing is wrapped or cut, however long the lines.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        body = [[_cell(value) for value in row] for row in rows]
        view = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for index, column in enumerate(columns):
            cells = [row[index] for row in body if row[index] != _NOTHING]
            numeric = bool(cells) and all(map(_is_number, cells))
            view.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in body:
            view.add_row(*(Text(cell) for cell in row))
        # As a part of the table, a longer title would be wrapped to the table's width.
        parts: list[RenderableType] = [Text(title, style="bold")] if title is not None else []
        parts.append(view)
        if caption is not None:
            parts.append(Text(caption, style="dim"))
        self._print(parts, UNWRAPPED)

    def render(self, renderable: RenderableType, *, piped_width: int = PIPED_WIDTH) -> None:
        """Print any rich renderable to stdout (heat-maps, panels).

        Args:
            renderable: what to print.
            piped_width: of a line where there is no terminal; ``UNWRAPPED`` wraps nothing.
        """
        self._print([renderable], piped_width)

    def _print(self, parts: Sequence[RenderableType], piped_width: int) -> None:
        console = _console(sys.stdout, piped_width)
        if console.is_terminal:
            console.print(*parts, sep="\n")
            return
        with console.capture() as captured:
            console.print(*parts, sep="\n")
        self.data("\n".join(line.rstrip() for line in captured.get().splitlines()))

    # talk: stderr

    def say(self, text: str, *, style: str | None = None) -> None:
        """One line (or more) of talk. Never interpreted as markup."""
        self._talk([(text, style)])

    def warn(self, text: str) -> None:
        self._talk([("warning: ", _STYLES["warning"]), (text, None)])

    def error(self, error: MoectlError) -> None:
        """What happened, and what to do next."""
        self._talk([("error: ", _STYLES["error"]), (error.message, None)])
        if error.hint:
            self._talk([(" hint: ", _STYLES["hint"]), (error.hint, None)])

    @contextmanager
    def progress(self, label: str, total: float | None = None) -> Iterator[Bar]:
        """A progress bar on a terminal; otherwise a plain line every few seconds."""
        if self._live is not None or not sys.stderr.isatty():
            yield Bar(self, label, total, None)
            return
        from rich import progress as rich_progress

        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(compact=True),
            rich_progress.TextColumn("{task.fields[note]}", markup=False),
        )
        with rich_progress.Progress(*columns, console=_console(sys.stderr), transient=True) as live:
            self._live = live
            try:
                yield Bar(self, label, total, live)
            finally:
                self._live = None

    def _talk(self, parts: Sequence[tuple[str, str | None]]) -> None:
        if self._live is None and not sys.stderr.isatty():
            sys.stderr.write("".join(text for text, _ in parts) + "\n")
            sys.stderr.flush()
            return
        from rich.text import Text

        console = self._live.console if self._live is not None else _console(sys.stderr)
        console.print(Text.assemble(*((text, style or "") for text, style in parts)), soft_wrap=True)


def _console(stream: TextIO, piped_width: int = PIPED_WIDTH) -> Console:
    """A console for a stream; ``piped_width`` stands in where there is no terminal to ask."""
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = piped_width
    return console


def _cell(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").rstrip("%×"))
    except ValueError:
        return False
    return True


_output = Output()


def out() -> Output:
    """The process's output object."""
    return _output
