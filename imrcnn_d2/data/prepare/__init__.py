"""Preparation: splits, metadata, de-identification, near-duplicates, synthetic images."""
