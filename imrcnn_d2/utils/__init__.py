"""files: paths, atomic writes, JSON and CSV; safe_loading: weights, without running code."""
