"""What ends a process that hangs."""

import subprocess
import sys

from moe_jax.benchmarking.watchdog import HUNG, TIME_OVER

PROGRAM = """
import sys, time
from moe_jax.benchmarking.watchdog import watch
def last_words(why):
    print(why, flush=True)
    {last_words}
with watch("a kernel", 0.3, last_words{status}):
    time.sleep({seconds})
print("done")
"""


def run(seconds, last_words="pass", status=""):
    program = PROGRAM.format(seconds=seconds, last_words=last_words, status=status)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout


def test_what_takes_too_long_is_named_and_ends_the_process():
    assert run(60) == (HUNG, "a kernel: not done after 0.3 s\n")


def test_that_all_time_is_over_has_a_status_of_its_own():
    assert run(60, status=f", {TIME_OVER}")[0] == TIME_OVER != HUNG


def test_the_process_ends_even_if_its_last_words_fail():
    assert run(60, "raise OSError")[0] == HUNG


def test_what_ends_in_time_goes_on():
    assert run(0) == (0, "done\n")
