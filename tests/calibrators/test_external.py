"""Calibrators of other libraries behind our interface."""

import copy
import io
import sys

import pytest
import torch
from calibrators.worlds import draw

from moe_posterior.calibrators import (
    Calibrator,
    ExpertTemperature,
    Multicalibration,
    Outputs,
    StructuredMatrixScaling,
    VennAbers,
)
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError, NotFittedError
from moe_posterior.metrics import calibration_error

MODULES = {StructuredMatrixScaling: "probmetrics", VennAbers: "venn_abers", Multicalibration: "mcgrad"}
every = pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)


@pytest.fixture
def fitted(kind: type[Calibrator]) -> tuple[Calibrator, Outputs]:
    pytest.importorskip(MODULES[kind], reason=f"{MODULES[kind]} is not installed")
    return kind().fit(*draw(300, seed=1, temperature=2.0)), draw(500, seed=2, temperature=2.0)[0]


def hide(kind: type[Calibrator], patch: pytest.MonkeyPatch) -> None:
    """As if the library were not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == MODULES[kind]] + [MODULES[kind]]:
        patch.setitem(sys.modules, name, None)


@every
def test_an_overconfident_model_becomes_calibrated(kind, fitted) -> None:
    calibrator, _ = fitted
    outputs, target = draw(2000, seed=3, temperature=2.0)
    before, after = (float(calibration_error(p, target)) for p in (outputs.probs, calibrator(outputs)))
    assert after < 0.6 * before


@every
def test_rows_sum_to_one_and_the_label_stays_where_it_is_promised(kind, fitted) -> None:
    calibrator, outputs = fitted
    shown = calibrator(outputs)
    assert torch.allclose(shown.sum(1).double(), torch.ones(len(shown), dtype=torch.float64), atol=1e-6)
    if calibrator.keeps_top_label:
        assert torch.equal(shown.argmax(1), outputs.probs.argmax(1))


@every
def test_a_loaded_or_copied_calibrator_shows_the_same(kind, fitted) -> None:
    calibrator, outputs = fitted
    file = io.BytesIO()
    torch.save(calibrator.state_dict(), file)
    file.seek(0)
    loaded = kind()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(calibrator)):
        assert torch.equal(other(outputs), calibrator(outputs))


@every
def test_one_that_was_never_fitted_refuses(kind) -> None:
    with pytest.raises(NotFittedError):
        kind()(draw(5, seed=1)[0])


@every
def test_a_fit_that_fails_leaves_the_earlier_one_whole(kind, fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrator, outputs = fitted
    before = {name: value.clone() for name, value in calibrator.state_dict().items()}
    shown = calibrator(outputs)
    with monkeypatch.context() as patch:
        hide(kind, patch)
        with pytest.raises(MissingDependencyError):
            calibrator.fit(*draw(200, seed=4))
    assert all(torch.equal(value, before[name]) for name, value in calibrator.state_dict().items())
    assert torch.equal(calibrator(outputs), shown)


@every
def test_without_the_library_the_error_names_what_to_install(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(kind, monkeypatch)
    with pytest.raises(MissingDependencyError, match="moe-posterior"):
        kind().fit(*draw(50, seed=1))


def test_another_number_of_classes_is_refused() -> None:
    pytest.importorskip("probmetrics", reason="probmetrics is not installed")
    calibrator = StructuredMatrixScaling().fit(*draw(300, seed=1))
    with pytest.raises(InvalidArgumentError, match="classes"):
        calibrator(Outputs(torch.full((2, 9), 1 / 9)))


def test_a_stopped_temperature_ends_between_its_start_and_the_best() -> None:
    outputs, target = draw(2000, seed=1, temperature=4.0)
    best, stopped = (ExpertTemperature(steps=steps).fit(outputs, target).temperature for steps in (None, 50))
    assert bool((best > 1.5).all())
    assert bool(((stopped > 1.5) & (stopped <= best + 1e-6)).all())
    with pytest.raises(InvalidArgumentError, match="steps"):
        ExpertTemperature(steps=0)
