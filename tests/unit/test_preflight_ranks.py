"""Several processes have no preflight, and the run says so."""

from __future__ import annotations

import pytest

from eft.preflight import say_untried


def test_the_run_names_the_command_that_estimates_instead(caplog: pytest.LogCaptureFixture) -> None:
    say_untried(4)
    assert "preflight: not tried with 4 processes" in caplog.text
    assert "eft plan --world-size 4" in caplog.text
