"""Side-by-side measurements: one command, one process tree, every arm in turn."""
