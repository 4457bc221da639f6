"""Measure what a few masks, generated pairs and jointly drawn pairs are worth."""
