"""Train and measure the bundled models: `python -m experiments.bundled.train_street --help`."""
