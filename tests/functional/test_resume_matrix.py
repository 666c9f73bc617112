"""E3 over models, optimizers, packing and moments: a fixed cover here, all of it where `slow` tests run."""

from __future__ import annotations

import pytest

from eft.trainer.rng import RngLoaderMixin
from tests.functional.resume_matrix import MODELS, MOMENTS, OPTIMIZERS, PACKINGS, Case, Runs, all_cases, cover


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("matrix"))


def test_the_cover_has_everything() -> None:
    cases = cover()
    assert {case.model for case in cases} == set(MODELS)
    assert {case.optimizer for case in cases} == set(OPTIMIZERS)
    assert {case.packing for case in cases} == set(PACKINGS)
    assert {case.moment for case in cases} == set(MOMENTS)
    for other in ("model", "packing"):
        pairs = {(case.optimizer, getattr(case, other)) for case in cases}
        assert len(pairs) == 2 * len(OPTIMIZERS)


def needs(case: Case) -> None:
    """Optional packages."""
    if case.optimizer == "8-bit":
        pytest.importorskip("bitsandbytes", reason="an optional package")


@pytest.mark.parametrize("case", cover(), ids=str)
def test_an_interrupted_run_is_the_straight_one(case: Case, runs: Runs) -> None:
    needs(case)
    assert runs.differences(case) == []


def test_a_lost_generator_would_show(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cover()[0]
    monkeypatch.setattr(RngLoaderMixin, "_load_rng_state", lambda self, checkpoint: None)
    assert {"rows", "generators"} <= set(runs.differences(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(all_cases()) - set(cover()), key=str), ids=str)
def test_every_other_combination(case: Case, runs: Runs) -> None:
    needs(case)
    assert runs.differences(case) == []
