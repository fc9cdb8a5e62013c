"""What the exit status of `moe-jax` means."""

SUCCESS = 0
CHECK_FAILED = 1
"""The command ran and found what it looks for: `verify` found differences, `compile` a program that does not fit."""
BAD_INPUT = 2
"""Wrong usage, files that cannot be used, or more than fits into memory."""
DEFECT = 70
"""The program itself failed, with a traceback (EX_SOFTWARE of sysexits.h)."""
INTERRUPTED = 130
"""Stopped by Ctrl-C (128 + SIGINT)."""
BROKEN_PIPE = 141
"""Whoever read the output went away (128 + SIGPIPE)."""

HELP = """\
exit status:
  0    success
  1    a check failed (verify found differences, compile that it does not fit)
  2    wrong usage, files that cannot be used, or out of memory
  70   the program failed, with a traceback: please report it
  130  interrupted with Ctrl-C
  141  the reader of the output went away
"""
