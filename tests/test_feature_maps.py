import pytest
import torch
from torch import nn

import kdx
from kdx.explain.feature_maps import channel_grid, magnitude


def test_by_hand():
    features = torch.tensor([[[[1.0, -2.0]], [[3.0, 4.0]]]])  # one image, two channels, 1 x 2 places
    assert magnitude(features).tolist() == [[[2.0, 3.0]]]


def test_a_stage_is_that_of_its_module_and_modes_stay():
    network = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    with torch.no_grad():
        network[0].weight[:] = torch.tensor([[1.0, 0, 0], [0, -1.0, 0]])[:, :, None, None]
    images = torch.rand(2, 3, 4, 5)
    maps = kdx.feature_map(network, images, {"first": "0"})
    torch.testing.assert_close(maps["first"], (images[:, 0] + images[:, 1]) / 2)
    assert network.training


def test_all_stages_at_their_own_resolution():
    maps = kdx.feature_map(kdx.build("resnet10", 3, "small", 0.125, seed=0), torch.rand(2, 3, 32, 32))
    assert {stage: tuple(m.shape[1:]) for stage, m in maps.items()} == {
        "L1": (32, 32), "L2": (16, 16), "L3": (8, 8), "L4": (4, 4),
    }  # fmt: skip


@pytest.mark.parametrize(("channels", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (5, 2, 3), (7, 3, 3)])
def test_grid_holds_every_channel_once_in_order(channels, rows, columns):
    features = torch.arange(1.0, channels + 1)[None, :, None, None].expand(1, channels, 2, 3)
    grid = channel_grid(features)
    assert grid.shape == (1, rows * 2, columns * 3)
    corners = grid[0, ::2, ::3].flatten().tolist()
    assert corners == [*range(1, channels + 1), *[0] * (rows * columns - channels)]
