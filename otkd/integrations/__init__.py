"""Bridges to training frameworks, each a module that imports its framework only when asked for."""
