"""The command `otkd`."""
