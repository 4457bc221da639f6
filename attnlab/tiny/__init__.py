"""The bundled models and the scripts that train them: `python -m attnlab.tiny.train --help`."""
