import pytest
import torch
import torchvision
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import kdx
from kdx import activations, grad_cam, stages, unicam
from kdx.networks.vision_transformers import to_grid


def vit(seed=0, image_size=32):
    torch.manual_seed(seed)
    model = torchvision.models.VisionTransformer(
        image_size=image_size, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)  # zeros otherwise
    return model.eval()


def hugging_face_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=8, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def test_tokens_are_laid_out_as_a_square_without_their_prefix():
    square = torch.zeros(2, 3, 24, 24)
    for prefix in (0, 1, 5):
        tokens = torch.arange(2 * (prefix + 9) * 3).view(2, prefix + 9, 3)
        grid = to_grid("L1", "block", tokens, square)
        assert grid.shape == (2, 3, 3, 3)
        assert torch.equal(grid[1, :, 1, 2], tokens[1, prefix + 5])
    maps = torch.rand(2, 3, 4, 5)
    assert to_grid("L1", "block", maps, square) is maps
    for shape in ((2, 3), (2, 35, 3), (2, 1, 3), (2, 129, 3)):
        with pytest.raises(ValueError, match=r"L1 \(block\): expected feature maps .* lie: kdx.stages"):
            to_grid("L1", "block", torch.zeros(shape), square)
    with pytest.raises(ValueError, match="square of a square image"):  # 4 x 6 patches and a class token are no 5 x 5
        to_grid("L1", "block", torch.zeros(2, 25, 3), torch.zeros(2, 3, 32, 48))
    with pytest.raises(ValueError, match=r"L1 \(block\): expected a row for each of 2 images, got \(16, 2, 3\)"):
        to_grid("L1", "block", torch.zeros(16, 2, 3), square)


def test_stages_of_transformers_are_the_last_blocks_of_their_quarters():
    expected = [f"encoder.layers.encoder_layer_{i}" for i in (0, 2, 3, 5)]
    assert list(stages(vit(), torch.rand(1, 3, 32, 32)).values()) == expected
    names = stages(hugging_face_vit(), torch.rand(1, 3, 32, 32))
    assert [name.rpartition(".")[2] for name in names.values()] == ["1", "3", "5", "7"]
    with pytest.raises(ValueError, match="found no sequence of shrinking feature maps"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), torch.rand(1, 3, 8, 8))


def test_grad_cam_of_tokens_equals_pytorch_grad_cam():
    model, x = vit(), torch.rand(3, 3, 32, 32)
    ours = grad_cam(model, x, torch.tensor([1, 0, 4]))["L3"]  # behind the last block only the class token counts
    assert ours.shape == (3, 4, 4)
    assert ours.max() > 0
    square = lambda tokens: tokens[:, 1:].reshape(-1, 4, 4, 16).permute(0, 3, 1, 2)  # noqa: E731
    with GradCAM(model, [model.encoder.layers[3]], reshape_transform=square) as cam:
        cam(x, [ClassifierOutputTarget(t) for t in (1, 0, 4)])
        gradients, features = cam.activations_and_grads.gradients[0], cam.activations_and_grads.activations[0]
    expected = (gradients.mean((2, 3), keepdim=True) * features).sum(1).relu()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("make", [vit, hugging_face_vit])
def test_maps_and_scores_of_transformers_beside_a_cnn(make):
    student, base, x = make(), kdx.build("resnet10", 5, "small", seed=0).eval(), torch.rand(20, 3, 32, 32)
    labels = torch.arange(20) % 5
    table = torch.eye(5)
    maps = unicam(kdx.Reference(student, base, x), table[labels])
    assert [m.shape for m in maps.distilled.values()] == [(20, 4, 4)] * 4
    assert all(m.max() > 0 for m in maps.distilled.values())
    assert [m.shape[1] for m in maps.residual.values()] == [32, 16, 8, 4]
    assert kdx.rs(student, x, labels, table, batches=2, batch_size=10)["value"].notna().all()


def test_reshape_says_how_an_output_lies():
    class Last(nn.Module):
        """Feature maps (n, h, w, k), as Swin has them."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 6, 4, 4)
            self.block = nn.Linear(6, 6)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.block(self.embed(x).permute(0, 2, 3, 1)).relu().mean((1, 2)))

    torch.manual_seed(0)
    model, x = Last().eval(), torch.rand(4, 3, 16, 24)
    layers = stages(model, x, modules=["block"], reshape=lambda y: y.permute(0, 3, 1, 2))
    assert layers == {"L1": "block"}
    assert grad_cam(model, x, 2, layers)["L1"].shape == (4, 4, 6)
    both = kdx.Reference(model, model, torch.rand(6, 3, 16, 24), layers_student=layers, layers_base=layers)
    assert unicam(both, torch.eye(2)[torch.arange(6) % 2]).distilled["L1"].shape == (6, 4, 6)
    wrong = stages(model, x, modules=["block"], reshape=lambda y: y[0])
    with pytest.raises(ValueError, match=r"L1 \(block\): expected reshape to give \(n, k, h, w\), got \(4, 6, 6\)"):
        grad_cam(model, x, 2, wrong)


def test_networks_inside_of_data_parallel_are_explained_themselves():
    model, x = kdx.build("resnet10", 5, "small", 0.125, seed=0).eval(), torch.rand(2, 3, 32, 32)
    wrapped = nn.DataParallel(model)
    assert stages(wrapped, x) == stages(model, x)
    for stage, m in grad_cam(wrapped, x, 1).items():
        assert torch.equal(m, grad_cam(model, x, 1)[stage])
    layers = stages(model, x)
    assert torch.equal(activations(wrapped, x, layers)["L4"], activations(model, x, layers)["L4"])
