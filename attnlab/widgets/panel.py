"""The parts of all widgets: a line of messages, and a still picture for notebooks that are only read."""

import base64
import html
import logging
import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import anywidget
import ipywidgets as ui

from .drawing import as_png
from .views import Stopped

__all__ = ["ROW_LAYOUT", "Panel", "Report", "row", "sized"]

log = logging.getLogger(__name__)
_CATCHING = threading.RLock()
ROW_LAYOUT = {"flex_flow": "row wrap", "align_items": "center"}  # it breaks where the window is narrow


@contextmanager
def _catching():
    """Record warnings, in one thread at a time: what two restored crosswise would stay silent for ever."""
    with _CATCHING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


class Report(ui.HTML):
    """A line of text that shows errors and warnings, where a traceback would be lost."""

    failed = False  # whether it shows that something failed

    def say(self, text: str, failed: bool = False) -> None:
        """Show a text, in the theme's red if something failed."""
        self.failed = failed
        color = ' style="color: var(--jp-error-color1, #b00020)"' if failed else ""
        self.value = f'<span role="status"{color}>{html.escape(text)}</span>'

    def forget(self) -> None:
        """Show no longer what failed before."""
        if self.failed:
            self.say("")

    @contextmanager
    def saying(self, errors_only: bool = False):
        """Show what is raised or warned within the block, which then ends.

        Python catches warnings for all threads at once, so that blocks that run at the same time as others, such as a
        generation in the background, take `errors_only`.
        """
        with nullcontext([]) if errors_only else _catching() as caught:
            try:
                yield
            except Stopped as stop:
                self.say(str(stop))
            except Exception as error:  # each pipeline has its own
                log.debug("shown in the widget", exc_info=True)
                self.say(str(error.args[0] if error.args else error), failed=True)
            else:
                # other categories are for programmers, and of other packages
                if shown := [one for one in caught if issubclass(one.category, UserWarning)]:
                    self.say(str(shown[-1].message), failed=True)


class _Stills(anywidget.AnyWidget):
    """Nothing to be seen; where JupyterLab saves a notebook, it adds pictures for times when no kernel runs."""

    _esm = Path(__file__).with_name("stills.js")


class Panel(ui.VBox):
    """A widget that is a still picture as well: `still()` returns its pixels, uint8 (row, column, rgb)."""

    def __init__(self, children: Sequence[ui.Widget]):
        super().__init__(children)
        self.stills = _Stills()
        self.add_class(f"attnlab-{self.model_id}")  # by which stills.js finds it in the page

    def _repr_mimebundle_(self, **kwargs):
        found = super()._repr_mimebundle_(**kwargs)
        return {**found, "image/png": base64.b64encode(as_png(self.still())).decode()}


def row(*children: ui.Widget) -> ui.HBox:
    """Put widgets into a line that breaks where the window is narrow."""
    return ui.HBox(children, layout=ROW_LAYOUT)


def sized(width: str) -> dict:
    """Return the options of a control of a width, at most the window's, with its description in full."""
    return {"style": {"description_width": "initial"}, "layout": {"width": width, "max_width": "100%"}}
