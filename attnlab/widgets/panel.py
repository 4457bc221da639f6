"""What all widgets share: a line that says what happened, and a still picture where no browser is behind the cell."""

import base64
import html
import logging
import warnings
from contextlib import contextmanager

import ipywidgets as ui

from .drawing import as_png
from .views import Stopped

log = logging.getLogger(__name__)
COLORS = {"says": "#333333", "failed": "#b00020"}


class Report(ui.HTML):
    """A line of text; errors and warnings of a `saying` block stand there instead of a traceback."""

    def say(self, text: str, kind: str = "says") -> None:
        self.value = f'<span role="status" style="color:{COLORS[kind]}">{html.escape(text)}</span>'

    @contextmanager
    def saying(self):
        """What is raised or warned within the block is said here, and the block is left."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                yield
            except Stopped:
                self.say("stopped on the way; the picture before it is kept")
            except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
                log.debug("said in the widget", exc_info=True)
                self.say(str(error.args[0] if error.args else error), "failed")
            else:
                if said:
                    self.say(str(said[-1].message), "failed")


class Panel(ui.VBox):
    """A widget that is also a still picture, for notebooks that are only read.

    Each has `still()`: pixels uint8 (row, column, rgb) of what it shows.
    """

    def _repr_mimebundle_(self, **kwargs):
        found = super()._repr_mimebundle_(**kwargs)
        return {**found, "image/png": base64.b64encode(as_png(self.still())).decode()}


def row(*children: ui.Widget) -> ui.HBox:
    """Widgets in a line that breaks where the window is narrow."""
    return ui.HBox(children, layout={"flex_flow": "row wrap", "align_items": "center"})


def sized(width: str) -> dict:
    """Options of a control so wide, at most as wide as the window, its description in full."""
    return {"style": {"description_width": "initial"}, "layout": {"width": width, "max_width": "100%"}}
