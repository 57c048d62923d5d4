"""The version of otkd, in a file of its own so that the build can read it without torch."""

__version__ = "0.1.0"
