"""The parts of all widgets: a line of messages, and a still picture for notebooks that are only read."""

import base64
import html
import logging
import warnings
from contextlib import contextmanager

import ipywidgets as ui

from .drawing import as_png
from .views import Stopped

__all__ = ["ROW_LAYOUT", "Panel", "Report", "row", "sized"]

log = logging.getLogger(__name__)
ROW_LAYOUT = {"flex_flow": "row wrap", "align_items": "center"}  # it breaks where the window is narrow


class Report(ui.HTML):
    """A line of text that shows errors and warnings, where a traceback would be lost."""

    def say(self, text: str, failed: bool = False) -> None:
        """Show a text, in red if something failed."""
        color = "#b00020" if failed else "#333333"
        self.value = f'<span role="status" style="color:{color}">{html.escape(text)}</span>'

    @contextmanager
    def saying(self):
        """Show what is raised or warned within the block, which then ends."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except Stopped:
                self.say("stopped on the way; the picture before it is kept")
            except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
                log.debug("shown in the widget", exc_info=True)
                self.say(str(error.args[0] if error.args else error), failed=True)
            else:
                if caught:
                    self.say(str(caught[-1].message), failed=True)


class Panel(ui.VBox):
    """A widget that is a still picture as well: `still()` returns its pixels, uint8 (row, column, rgb)."""

    def _repr_mimebundle_(self, **kwargs):
        found = super()._repr_mimebundle_(**kwargs)
        return {**found, "image/png": base64.b64encode(as_png(self.still())).decode()}


def row(*children: ui.Widget) -> ui.HBox:
    """Put widgets into a line that breaks where the window is narrow."""
    return ui.HBox(children, layout=ROW_LAYOUT)


def sized(width: str) -> dict:
    """Return the options of a control of a width, at most the window's, with its description in full."""
    return {"style": {"description_width": "initial"}, "layout": {"width": width, "max_width": "100%"}}
