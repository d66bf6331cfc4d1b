"""The web page: images in; contours, scores and files out; nothing is kept."""
