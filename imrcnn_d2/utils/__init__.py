"""files: paths, atomic writes, JSON and CSV; safe_loading: weights, without running code; hub: the
Hugging Face Hub; progress: bars and lines of long work.
"""
