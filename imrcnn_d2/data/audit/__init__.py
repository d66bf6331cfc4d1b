"""Audit of a data set: checks of files, annotations and duplicates; validity of its labels."""
