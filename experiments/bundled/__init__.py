"""The bundled models and the scripts that train them: `python -m experiments.bundled.train_street --help`."""
