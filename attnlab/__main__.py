"""`python -m attnlab` is `attnlab`."""

import sys

from .cli import main

sys.exit(main())
