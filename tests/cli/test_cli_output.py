"""How results are written: numbers in their units, nothing cut, and at once."""

import io
import sys

import pytest

from moe_jax.cli.commands.generate import StreamPrinter, emphasized, print_texts
from moe_jax.cli.output import format_bytes, format_seconds, format_value, print_facts, print_table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_994, "999.99 kB"),
        (999_996, "1.00 MB"),
        (1_500_000_000, "1.50 GB"),
        (2.5e12, "2.50 TB"),
        (5e15, "5000.00 TB"),
    ],
)
def test_bytes_are_counted_in_decimal_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.123, "0.12 s"),
        (9.5, "9.50 s"),
        (9.996, "10 s"),
        (59, "59 s"),
        (59.7, "1 min 00 s"),
        (125, "2 min 05 s"),
        (119.7, "2 min 00 s"),
    ],
)
def test_durations_are_seconds_or_minutes_with_two_digits_of_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (None, "-"),
        (1234567, "1,234,567"),
        (0.012345, "0.0123"),
        (-0.5, "-0.5"),
        (1234567.0, "1,234,567"),
        (-1234567.0, "-1,234,567"),
        ("a,b", "a,b"),
    ],
)
def test_values_are_written_for_people(value, text):
    assert format_value(value) == text


def test_long_names_in_a_table_are_folded_and_never_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "".join(f"layer{number}." for number in range(20))
    print_table("Tensors", ["tensor", "why"], [(name, "")])
    assert name in "".join(capsys.readouterr().out.split())


def test_a_column_is_aligned_right_only_if_all_its_values_are_numbers(capsys):
    print_table("Title", ["numbers", "others"], [(1, 2), (1000, "none")])
    # Text begins below its column's name, numbers end below the last letter of theirs.
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()[3:]] == [
        " numbers   others",
        " " + "─" * 16,
        "       1   2",
        "   1,000   none",
        "",
    ]


def test_a_fact_stays_on_its_line_however_long_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_facts("A title that is longer than the forty columns", [("name", "word " * 30 + "end")])
    assert capsys.readouterr().out.splitlines() == [
        "A title that is longer than the forty columns",
        "  name  " + "word " * 30 + "end",
    ]


@pytest.mark.parametrize(("no_color", "expected"), [(False, "\x1b[1mHello\x1b[0m"), (True, "Hello")])
def test_a_prompt_is_bold_on_a_terminal_but_not_with_no_color(no_color, expected, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    assert emphasized("Hello") == expected


def collect_what_leaves_the_process(monkeypatch):
    """Standard output as a pipe or a file is: what is written stays in the process until it is flushed."""
    left = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(left, encoding="utf-8"))
    return left.getvalue


def test_text_leaves_the_process_with_its_token(monkeypatch):
    class Stream:
        def __init__(self, *_):
            pass

        def add(self, token):
            return chr(token)

        def finish(self):
            return ""

    monkeypatch.setattr("moe_jax.tokenization.TextStream", Stream)
    written = collect_what_leaves_the_process(monkeypatch)
    printer = StreamPrinter(None, [], None)
    printer.add(0, ord("a"))
    assert written() == b"a"
    printer.add(0, ord("b"))
    assert written() == b"ab"
    printer.finish()
    assert written() == b"ab\n"


def test_the_texts_of_a_batch_leave_the_process_before_the_next_batch(monkeypatch):
    written = collect_what_leaves_the_process(monkeypatch)
    print_texts(["one ", "two "], ["a", "b"], chat=False, after_others=False)
    assert written() == b"one a\n\ntwo b\n"
    print_texts(["Hi"], ["c"], chat=True, after_others=True)
    assert written() == b"one a\n\ntwo b\n\n> Hi\nc\n"
