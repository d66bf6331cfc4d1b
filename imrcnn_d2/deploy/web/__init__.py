"""The web page: images in, outlines, scores and files out; nothing is kept."""
