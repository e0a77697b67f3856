"""Backbones: shapes, errors, and that they can learn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_posterior.errors import InvalidArgumentError
from moe_posterior.training.backbones import DigitsNet, ResNet, paper_resnet, reduced_resnet
from moe_posterior.training.data import Digits


@pytest.mark.parametrize("count", [0, 1, 5])
def test_digits_net_returns_out_features_for_any_batch_size(count: int) -> None:
    net = DigitsNet(out_features=12)
    assert net(torch.rand(count, 1, 8, 8)).shape == (count, net.out_features)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_resnet_returns_out_features_for_any_batch_size(count: int) -> None:
    net = ResNet(widths=(4, 8, 12), blocks=(1, 2, 1)).eval()
    assert net(torch.rand(count, 3, 32, 32)).shape == (count, 12)


def test_the_paper_network_has_three_stages_of_two_blocks_and_256_features() -> None:
    net = paper_resnet()
    assert net.out_features == 256
    assert len(net.stages) == 6
    with torch.no_grad():
        assert net.eval().stem(torch.rand(1, 3, 32, 32)).shape == (1, 64, 32, 32)
        assert net.stages(net.stem(torch.rand(1, 3, 32, 32))).shape == (1, 256, 8, 8)


def test_the_reduced_network_has_the_papers_width_at_less_than_an_eighth_of_its_multiplications() -> None:
    def multiplications(net: ResNet) -> int:
        counts: list[int] = []
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(
                    lambda module, args, output: counts.append(output[0, 0].numel() * module.weight.numel())
                )
        net.eval()(torch.rand(1, 3, 32, 32))
        return sum(counts)

    assert reduced_resnet().out_features == paper_resnet().out_features
    assert multiplications(reduced_resnet()) * 8 < multiplications(paper_resnet())


def test_a_strided_stem_halves_the_resolution_of_the_first_stage() -> None:
    net = ResNet(widths=(4, 8), blocks=(1, 1), stem_stride=2, stem_width=6)
    assert net.stem(torch.rand(1, 3, 32, 32)).shape == (1, 6, 16, 16)


def test_memory_format_does_not_change_the_result() -> None:
    first, second = (ResNet(widths=(4, 8), blocks=(1, 1), channels_last=choice).eval() for choice in (True, False))
    second.load_state_dict(first.state_dict())
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(first(images), second(images))


def test_a_new_block_is_its_shortcut() -> None:
    net = ResNet(widths=(4,), blocks=(1,)).eval()
    hidden = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(net.stages(hidden), hidden)


def test_resnet_standardises_images_by_the_given_constants() -> None:
    net = ResNet(widths=(4,), blocks=(1,), mean=(0.2, 0.5, 0.7), std=(0.1, 0.2, 0.4)).eval()
    seen: list[torch.Tensor] = []
    net.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(torch.tensor([0.3, 0.5, 0.3]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.0, 0.0, -1.0]))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 9, 8), (1, 8, 8)])
def test_digits_net_rejects_other_shapes_and_says_which(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"\(N, 1, 8, 8\); got \(" + ", ".join(map(str, shape))):
        DigitsNet()(torch.rand(shape))


def test_resnet_rejects_images_of_other_channels() -> None:
    with pytest.raises(InvalidArgumentError, match=r"\(N, 3, H, W\); got \(2, 1, 32, 32\)"):
        ResNet(widths=(4,), blocks=(1,))(torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (4, 8), "blocks": (1,)}, "blocks must give one number per width"),
        ({"widths": (), "blocks": ()}, "blocks must give one number per width"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "std must have one value per channel"),
    ],
)
def test_resnet_rejects_arguments_that_do_not_fit_together(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ResNet(**arguments)


def test_digits_net_learns_the_digits() -> None:
    torch.manual_seed(0)  # weights only; torch's initialisers take no generator
    data = Digits()
    net = nn.Sequential(DigitsNet(), nn.Linear(64, data.num_classes))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loader = data.train_dataloader()
    for epoch in range(15):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(batch["input"]), batch["target"]).backward()
            optimizer.step()
    correct = torch.cat([net(batch["input"]).argmax(1) == batch["target"] for batch in data.test_dataloader()])
    assert correct.double().mean() > 0.95
