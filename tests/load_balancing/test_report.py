"""What a rearrangement says of itself, on numbers that can be counted by hand."""

import matplotlib.axes
import numpy as np
import pytest

from moe_jax.load_balancing import write_balance_picture
from moe_jax.load_balancing.report import Rearrangement


@pytest.fixture
def report():
    """Expert 0 has two thirds of the load and gets the slot of a copy of expert 1: ranks of 8 and 4, then of 6 and 6."""
    return Rearrangement(
        num_ranks=2,
        logical_load=np.array([[8.0, 2.0, 2.0]]),
        measured_load=np.array([[8.0, 0.0, 2.0, 2.0]]),
        old_physical_to_logical=np.array([[0, 1, 1, 2]]),
        new_physical_to_logical=np.array([[0, 1, 0, 2]]),
        sent=3,
        copied=5,
    )


def test_a_report_tells_balance_before_and_after_and_what_was_sent_and_copied(report):
    np.testing.assert_array_equal(report.rank_load_before, [[8, 4]])
    np.testing.assert_array_equal(report.rank_load_after, [[6, 6]])
    assert str(report) == "balancedness 0.750 -> 1.000 (expected), 3 experts sent, 5 copied"


def test_the_picture_shows_shares_of_the_mean_of_each_layer_before_and_after(report, tmp_path, monkeypatch):
    shown = []

    def imshow(self, image, **options):
        shown.append((np.asarray(image).tolist(), options["vmin"], options["vmax"]))
        return draw(self, image, **options)

    draw = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", imshow)
    write_balance_picture(tmp_path / "balance.svg", report)
    assert shown == [([[8 / 6, 4 / 6]], 0, 8 / 6), ([[1.0, 1.0]], 0, 8 / 6)]
    texts = (tmp_path / "balance.svg").read_text()
    assert "before: balancedness 0.750" in texts
    assert "after: balancedness 1.000" in texts
