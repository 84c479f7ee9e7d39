"""The version of the toolkit, in one place (setup.py and ``--version`` read it)."""

__version__ = "0.8.0"
