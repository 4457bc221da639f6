"""Record a pipeline's attention: `record` while it generates, `record_image` for an existing image, and `Recording`."""

from .again import record_again
from .existing import record_image
from .recorder import record
from .recording import Recording
from .texts import TextEncoder

__all__ = ["Recording", "TextEncoder", "record", "record_again", "record_image"]
