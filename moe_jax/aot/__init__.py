"""Compiling ahead of time for accelerators that are not present, and reading what their compilers report."""
