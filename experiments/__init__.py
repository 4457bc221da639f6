"""Train the bundled models, and make the numbers of the README, the cards and the figures (see README.md)."""
