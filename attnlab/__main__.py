"""Run `python -m attnlab` as `attnlab`."""

import sys

from .cli import main

sys.exit(main())
