"""What every calibrator must do, whichever it is."""

import copy
import io
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from calibrators.worlds import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_posterior.calibrators import (
    Calibrator,
    ConfigurationCalibrator,
    ExpertTemperature,
    HistogramBinning,
    IsotonicCalibration,
    MultiDomainTemperature,
    OnlineConfigurationCalibrator,
    Outputs,
    ShiftAwareTemperature,
    TemperatureScaling,
    VectorScaling,
)
from moe_posterior.calibrators.probabilities import with_confidence
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError, NotFittedError

MAKERS: dict[str, Callable[[], Calibrator]] = {
    "temperature": TemperatureScaling,
    "expert": ExpertTemperature,
    "vector": VectorScaling,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
    "expert, stopped": lambda: ExpertTemperature(steps=50),
    "domains": MultiDomainTemperature,
    "configuration": ConfigurationCalibrator,
    "shift": ShiftAwareTemperature,
    "online": lambda: OnlineConfigurationCalibrator(TemperatureScaling()),
    "online over vector": lambda: OnlineConfigurationCalibrator(VectorScaling(), half_life=50.0),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def trained(make: Callable[[], Calibrator], rows: int = 300) -> Calibrator:
    outputs, target = draw(rows, seed=1, temperature=2.0)
    calibrator = make().fit(outputs, target)
    if isinstance(calibrator, OnlineConfigurationCalibrator):
        calibrator.observe(outputs, torch.arange(rows) % 3 == 0)
    if isinstance(calibrator, ShiftAwareTemperature):
        calibrator.adapt(draw(50, seed=2)[0])
    return calibrator


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_sum_to_one_and_keep_dtype_and_label(make: Callable[[], Calibrator], dtype: torch.dtype) -> None:
    calibrator = trained(make)
    outputs, _ = draw(500, seed=3, temperature=3.0)
    outputs = outputs._replace(probs=outputs.probs.to(dtype))
    shown = calibrator(outputs)
    assert shown.dtype == torch.promote_types(dtype, torch.float32)
    assert (shown >= 0).all()
    torch.testing.assert_close(shown.double().sum(1), torch.ones(500, dtype=torch.float64), atol=1e-5, rtol=0)
    if calibrator.keeps_top_label:
        assert torch.equal(shown.max(1).indices, outputs.probs.max(1).indices)


@every
def test_pickle_copy_and_state_dict_give_the_same_bits(make: Callable[[], Calibrator]) -> None:
    calibrator = trained(make)
    outputs, _ = draw(200, seed=4)
    expected = calibrator(outputs)
    file = io.BytesIO()
    torch.save(calibrator.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file))
    for twin in (pickle.loads(pickle.dumps(calibrator)), copy.deepcopy(calibrator), fresh):
        assert torch.equal(twin(outputs), expected)
    wrapped = torch.nn.ModuleDict({"inner": make()})
    wrapped.load_state_dict({f"inner.{name}": value for name, value in calibrator.state_dict().items()})
    assert torch.equal(wrapped["inner"](outputs), expected)


@every
def test_fit_is_deterministic_and_forgets_the_fit_before(make: Callable[[], Calibrator]) -> None:
    outputs, target = draw(300, seed=1, temperature=2.0)
    once = make().fit(outputs, target)
    again = make()
    if not isinstance(again, OnlineConfigurationCalibrator):  # its static calibrator stays as it was fitted
        again.fit(*draw(100, seed=9))
    again.fit(outputs, target)
    assert torch.equal(once(outputs), again(outputs))


@every
def test_every_call_before_fit_is_refused(make: Callable[[], Calibrator]) -> None:
    outputs, _ = draw(4, seed=0)
    calibrator = make()
    with pytest.raises(NotFittedError, match=type(calibrator).__name__):
        calibrator(outputs)
    if isinstance(calibrator, OnlineConfigurationCalibrator):
        with pytest.raises(NotFittedError):
            calibrator.observe(outputs, torch.ones(4))
    if isinstance(calibrator, ShiftAwareTemperature):
        with pytest.raises(NotFittedError):
            calibrator.adapt(outputs)


@every
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_and_one_class_are_enough(make: Callable[[], Calibrator], rows: int, classes: int) -> None:
    outputs, target = draw(rows, seed=0, classes=classes)
    outputs = outputs._replace(domain=torch.zeros(rows, dtype=torch.int64))
    shown = make().fit(outputs, target)(outputs)
    assert shown.isfinite().all()
    torch.testing.assert_close(shown.sum(1), torch.ones(rows, dtype=torch.float64))


@every
def test_probabilities_of_zero_and_one_stay_finite(make: Callable[[], Calibrator]) -> None:
    outputs, target = draw(120, seed=0, classes=3)
    certain = torch.eye(3, dtype=torch.float64)[torch.arange(120) % 3]
    outputs = outputs._replace(
        probs=certain,
        expert_probs=certain[:, None].expand(120, 3, 3),
        novelty=torch.where(torch.arange(120) < 60, torch.inf, outputs.novelty),
    )
    calibrator = make().fit(outputs, target)
    shown = calibrator(outputs)
    assert shown.isfinite().all()
    assert torch.equal(shown.max(1).indices, certain.max(1).indices) or not calibrator.keeps_top_label


@every
def test_no_rows_can_be_shown_but_not_learned_from(make: Callable[[], Calibrator]) -> None:
    nothing, target = (draw(3, seed=0)[0].rows(torch.zeros(0, dtype=torch.int64)), torch.zeros(0, dtype=torch.int64))
    assert trained(make)(nothing).shape == (0, 5)
    with pytest.raises(InvalidArgumentError, match="at least one row"):
        make().fit(nothing, target)


@every
def test_missing_fields_and_wrong_values_are_named(make: Callable[[], Calibrator]) -> None:
    calibrator, (outputs, target) = make(), draw(10, seed=0)
    for name in calibrator.fit_needs:
        with pytest.raises(InvalidArgumentError, match=rf"outputs\.{name} must be given"):
            calibrator.fit(outputs._replace(**{name: None}), target)
    bad = [
        ("outputs.probs must be prob", outputs._replace(probs=outputs.probs * 2), target),
        ("outputs.probs must be prob", outputs._replace(probs=outputs.probs * torch.nan), target),
        ("outputs.probs must be float", outputs._replace(probs=outputs.probs[0]), target),
        ("outputs.configuration must have 10 rows", outputs._replace(configuration=torch.zeros(3)), target),
        ("outputs.configuration must be int64", outputs._replace(configuration=torch.zeros(10)), target),
        ("outputs.novelty must be at least 0", outputs._replace(novelty=torch.full((10,), -1.0)), target),
        ("outputs.expert_probs must have", outputs._replace(expert_probs=torch.zeros(10, 3, 9)), target),
        ("outputs.routing_weights must", outputs._replace(routing_weights=torch.zeros(10, 3)), target),
        ("outputs.routing_weights must", outputs._replace(routing_weights=torch.ones(10, 2)), target),
        ("target must be integer", outputs, target.double()),
        ("target must lie", outputs, target + 5),
    ]
    for message, wrong, labels in bad:
        with pytest.raises(InvalidArgumentError, match=message):
            calibrator.fit(wrong, labels)
    assert not calibrator.fitted


def test_isotonic_names_the_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.isotonic", None)
    with pytest.raises(MissingDependencyError, match="scikit-learn"):
        IsotonicCalibration().fit(*draw(10, seed=0))


@given(st.integers(2, 6), st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_moved_confidence_is_shown_and_keeps_label_and_order(classes: int, seed: int, confidence: float) -> None:
    outputs, _ = draw(8, seed=seed, classes=classes)
    moved = with_confidence(outputs.probs, torch.full((8,), confidence, dtype=torch.float64))
    label = outputs.probs.argmax(1)
    expected = torch.full((8,), max(confidence, 1 / classes), dtype=torch.float64)
    torch.testing.assert_close(moved.gather(1, label[:, None])[:, 0], expected)
    torch.testing.assert_close(moved.amax(1), expected)
    torch.testing.assert_close(moved.sum(1), torch.ones(8, dtype=torch.float64))
    in_order = moved.gather(1, outputs.probs.argsort(1, descending=True))
    assert (in_order.diff(dim=1) <= 1e-12).all()
    assert Outputs(moved).probs.min() >= 0


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "float": lambda model: model.to(torch.float32),
    "double": lambda model: model.double(),
    "there and back": lambda model: model.bfloat16().float(),
    "type": lambda model: model.type(torch.float16),
    "a copy cast": lambda model: copy.deepcopy(model).half(),
    "each module": lambda model: model.apply(lambda module: module.to(torch.bfloat16)),
}


@every
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_of_the_model_around_it_leaves_every_bit(make: Callable[[], Calibrator], cast: Callable) -> None:
    calibrator, (outputs, target) = trained(make), draw(200, seed=4)
    expected = calibrator(outputs)
    model = cast(torch.nn.ModuleDict({"cal": calibrator, "head": torch.nn.Linear(2, 2)}))
    assert torch.equal(model["cal"](outputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model["cal"](outputs), expected)
    assert model["head"].weight.dtype == (
        torch.float32 if cast is CASTS["there and back"] else model["head"].bias.dtype
    )
    fresh = make().half().fit(outputs, target)  # nor does a cast before the fit
    assert torch.equal(fresh(outputs), make().fit(outputs, target)(outputs))


@every
def test_fitting_under_autocast_or_inference_mode_gives_the_same_map(make: Callable[[], Calibrator]) -> None:
    outputs, target = draw(300, seed=1, temperature=2.0)
    expected = trained(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trained(make)
    assert torch.equal(found(outputs), expected(outputs))
    with torch.inference_mode():
        found = trained(make)
        shown = found(Outputs(*(None if field is None else field.clone() for field in outputs)))
    assert torch.equal(shown, expected(outputs))
    assert not any(buffer.is_inference() for buffer in found.buffers())
    if isinstance(found, OnlineConfigurationCalibrator):
        found.observe(outputs, target == 0)
    found.fit(outputs, target)


@every
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_cast_state_keeps_float64_and_warns(make: Callable[[], Calibrator], assign: bool) -> None:
    calibrator, (outputs, _) = trained(make), draw(50, seed=4)
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in calibrator.state_dict().items()}
    fresh = make()
    with pytest.warns(UserWarning, match="rounded when the checkpoint was"):
        fresh.load_state_dict(cast, assign=assign)
    assert [buffer.dtype for buffer in fresh.buffers()] == [buffer.dtype for buffer in calibrator.buffers()]
    fresh(outputs)
    fresh.load_state_dict(calibrator.state_dict(), assign=assign)
    assert torch.equal(fresh(outputs), calibrator(outputs))
