"""The version, also written into adapter files."""

__version__ = "0.1.0"
