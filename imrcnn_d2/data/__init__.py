"""Data sets: formats in, COCO out; catalog names; mappers."""
