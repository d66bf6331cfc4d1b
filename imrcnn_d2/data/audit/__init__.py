"""Audit: what is wrong with a data set, found before it costs a training run."""
