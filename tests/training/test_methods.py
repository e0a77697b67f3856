"""Every objective trains both gates; the ERM warm-up is shared bit for bit; FGR filters and projects as it says."""

from functools import partial
from pathlib import Path

import lightning
import pytest
import scipy.fft
import torch
from points import Plane, Points

from moe_posterior import InvalidArgumentError, PosteriorGate, SoftmaxGate
from moe_posterior.training import methods
from moe_posterior.training.callbacks import CompetenceUpdates, WarmupCheckpoint
from moe_posterior.training.lowpass import lowpass, quantisation_table
from moe_posterior.training.module import MoEClassifier, project

GATES = {
    "softmax": lambda size, experts: SoftmaxGate(size, experts, experts, router_width=8),
    "posterior": lambda size, experts: PosteriorGate(size, experts, 4, 2),
}
METHODS = {
    "vanilla": methods.Vanilla,
    "vanilla with own losses": partial(methods.Vanilla, expert_weight=0.03),
    "robust": methods.Robust,
    "robust detached": lambda warmup: methods.Robust(warmup, detach_weights=True),
    "robust filtered": methods.RobustFiltered,
    "robust filtered by quantile": lambda warmup: methods.RobustFiltered(warmup, quantile=0.5),
    "group dro": methods.GroupDRO,
    "mmce": methods.MMCE,
    "soft ece": methods.SoftECE,
    "fgr": methods.FGR,
    "fgr + robust": lambda warmup: methods.FGR(warmup, base="robust"),
    "robust configuration": methods.RobustConfiguration,
    "robust configuration + robust": lambda warmup: methods.RobustConfiguration(warmup, robust=True),
}


def trained(
    gate: str, method: methods.Method, epochs: int = 3, keep: Path | None = None, branch: Path | None = None
) -> dict[str, torch.Tensor]:
    """Weights after training, from the start or from a kept warm-up."""
    lightning.seed_everything(0, verbose=False)
    data = Points(batch_size=48, seed=1)
    model = MoEClassifier(Plane(), 3, gate=GATES[gate], lr=1e-2, method=method, num_groups=data.num_groups)
    callbacks: list[lightning.Callback] = [CompetenceUpdates()]
    if keep is not None:
        callbacks.append(WarmupCheckpoint(keep))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    trainer.fit(model, datamodule=data, ckpt_path=branch, weights_only=False if branch else None)
    return {name: value.clone() for name, value in model.state_dict().items()}


def without_method(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("method.")}


@pytest.fixture(scope="module", params=GATES)
def warmed_up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A gate, the weights that plain ERM ends with, and the state it leaves at the end of its first two epochs."""
    folder = tmp_path_factory.mktemp("warmup")
    return request.param, trained(request.param, methods.Vanilla(2), 4, keep=folder), folder / "warmup.ckpt"


@pytest.mark.parametrize("name", METHODS)
def test_branching_from_the_shared_warm_up_is_training_from_the_start_bit_for_bit(warmed_up, name: str) -> None:
    gate, erm, warmup = warmed_up
    scratch = trained(gate, METHODS[name](2), 4)
    branched = trained(gate, METHODS[name](2), 4, branch=warmup)
    assert scratch.keys() == branched.keys()
    assert all(torch.equal(scratch[key], branched[key]) for key in scratch)
    assert all(torch.isfinite(value).all() for value in scratch.values())
    same = all(torch.equal(erm[key], value) for key, value in without_method(scratch).items())
    if name != "fgr":  # without images and conflicts it is ERM
        assert same == (name == "vanilla")


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="warmup_epochs must be at least 0"):
        methods.Robust(-1)


def test_group_dro_wants_groups() -> None:
    probs = torch.full((4, 3), 1 / 3)
    prediction = methods.Prediction(probs, probs[:, None], None)
    method = methods.GroupDRO()
    with pytest.raises(InvalidArgumentError, match="GroupDRO needs data with groups"):
        method.terms(prediction, torch.zeros(4, dtype=torch.int64), SoftmaxGate(2, 1, 1), None, 0)


def test_fgr_puts_filtered_rows_in_their_originals_places() -> None:
    method, images = methods.FGR(share=0.25), torch.rand(8, 3, 16, 16)
    extended = method.extend(images, torch.Generator().manual_seed(0))
    assert torch.equal(extended[:8], images)
    assert extended.shape == (10, 3, 16, 16)
    probs = torch.rand(10, 3).softmax(dim=-1)
    target = torch.randint(3, (8,))
    terms = method.objective(methods.Prediction(probs, probs[:, None], None), target, SoftmaxGate(2, 1, 1), None)
    places = [8, 9, 2, 3, 4, 5, 6, 7]
    expected = -sum(torch.log(probs[place, label]) for place, label in zip(places, target, strict=True)) / 8
    torch.testing.assert_close(terms.loss, expected)
    assert method.extend(torch.rand(8, 5), torch.Generator()).shape == (8, 5)


def test_the_low_pass_filter_is_jpegs_rounding_of_dct_coefficients() -> None:
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    filtered = lowpass(image, torch.Generator(), qualities=(18,))
    table = quantisation_table(18).numpy() / 255
    coefficients = scipy.fft.dctn(image[0, 0].numpy() - 0.5, norm="ortho")
    expected = scipy.fft.idctn((coefficients / table).round() * table, norm="ortho") + 0.5
    torch.testing.assert_close(
        filtered[0, 0].double(), torch.as_tensor(expected).double().clamp(0, 1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", [(8, 8), (13, 9), (32, 32)])
def test_the_low_pass_filter_keeps_shape_and_smooth_images_and_damps_noise(size: tuple[int, int]) -> None:
    ramp = torch.linspace(0.2, 0.8, size[1]).expand(2, 3, *size)
    noise = 0.45 + 0.1 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    smooth, rough = (lowpass(images, torch.Generator().manual_seed(0)) for images in (ramp, noise))
    assert smooth.shape == ramp.shape
    assert (smooth - ramp).abs().max() < 0.1
    assert rough.var() < 0.3 * noise.var()


def test_projection_removes_conflict_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        wanted, guard = ([torch.randn(3, generator=generator), torch.randn(2, 2, generator=generator)] for _ in "12")
        flat, other = (torch.cat([part.flatten() for part in parts]) for parts in (wanted, guard))
        got = torch.cat([part.flatten() for part in project(wanted, guard)])
        if flat @ other >= 0:
            assert torch.equal(got, flat)
        else:
            assert abs(float(got @ other)) < 1e-5
            assert float((flat - got) @ got) == pytest.approx(0, abs=1e-4)
    zero = [torch.zeros(3)]
    assert torch.equal(project([torch.ones(3)], zero)[0], torch.ones(3))
