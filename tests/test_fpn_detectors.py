import pytest
import torch
from torch import nn

import kdx
from kdx.networks import fpn_detectors
from kdx.networks.fpn_detectors import inherit, learn, levels_of, rebuild, watch_levels

BACKBONES = ("resnet10@0.0625", "resnet50@0.0625", "mobilenet_v1@0.0625", "mobilenet_v2@0.125", "efficientnet_b0@0.125")
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
TARGETS = [
    {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def tiny(kind="fcos", backbone="resnet10@0.0625", seed=0):
    return kdx.build_detector(kind, backbone, 2, (64, 96), seed=seed)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_levels_are_an_eighth_to_a_thirty_second_of_the_image(backbone):
    levels = levels_of(tiny(backbone=backbone).eval(), IMAGES)
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        "P3": (2, 32, 8, 12), "P4": (2, 32, 4, 6), "P5": (2, 32, 2, 3),
    }  # fmt: skip


@pytest.mark.parametrize("kind", fpn_detectors.KINDS)
def test_the_loss_is_torchvisions(kind, monkeypatch):
    monkeypatch.setattr(fpn_detectors, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    detector = tiny(kind).train()
    expected = sum(detector(list(IMAGES), TARGETS).values())
    loss, levels = learn(detector, IMAGES, TARGETS)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in detector.backbone.parameters())
    assert levels["P3"].grad_fn is not None


def test_batch_norms_are_trained_and_images_keep_their_size():
    detector = tiny()
    norms = [module for module in detector.modules() if "BatchNorm" in type(module).__name__]
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}
    assert all(parameter.requires_grad for parameter in detector.parameters())
    batch, _ = detector.transform(list(IMAGES))
    mean, deviation = (torch.tensor(values)[:, None, None] for values in fpn_detectors.IMAGENET)
    torch.testing.assert_close(batch.tensors, (IMAGES - mean) / deviation)


def test_seeds_decide_the_weights_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [detector.head.classification_head.conv[0].weight for detector in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_student_inherits_neck_and_head_but_not_the_backbone():
    student, teacher = tiny(), tiny(backbone="resnet10@0.125", seed=1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    inherit(student, teacher)
    after, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in after.items():
        if name.startswith("head.") or "fpn.layer_blocks" in name:
            assert torch.equal(tensor, theirs[name]), name
        else:  # the pyramid's first layers have other channels
            assert torch.equal(tensor, before[name]), name


def test_checkpoints_rebuild_a_detector(tmp_path):
    detector = tiny("retinanet").eval()
    kdx.save_checkpoint(tmp_path / "d.safetensors", detector, {"classes": ["a", "b"]})
    again, header = kdx.load_checkpoint(tmp_path / "d.safetensors", rebuild)
    assert header["architecture"] == detector.architecture == again.architecture
    assert all(torch.equal(a, b) for a, b in zip(detector.parameters(), again.parameters(), strict=True))
    assert rebuild(**kdx.build("resnet10", 3).architecture, seed=0).architecture["name"] == "resnet10"


def test_watching_collects_the_levels_in_the_graph_and_leaves_no_hook(monkeypatch):
    monkeypatch.setattr(fpn_detectors, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    detector = tiny().eval()
    with watch_levels(detector) as levels:
        found = detector(list(IMAGES))
        assert len(found) == 2
    torch.testing.assert_close(levels["P4"], levels_of(detector, IMAGES)["P4"])
    assert not detector.backbone._forward_hooks
    with pytest.raises(ValueError, match="feature pyramid, got ResNet"), watch_levels(kdx.build("resnet10", 3)):
        pass


def test_levels_are_known_by_their_strides_whatever_a_detector_calls_them():
    detector = tiny().eval()
    layers = detector.backbone.body.return_layers
    layers.update(zip(layers, "012", strict=True))  # as torchvision's own detectors do
    shapes = {name: tuple(level.shape[2:]) for name, level in levels_of(detector, IMAGES).items()}
    assert shapes == {"P3": (8, 12), "P4": (4, 6), "P5": (2, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kind": "yolo"}, "choose from: fcos, retinanet"), ({"channels": 48}, "multiple of 32"),
     ({"size": (64, 100)}, "multiples of 32"), ({"size": (64, 64)}, "64 x 96 or more"),
     ({"classes": 0}, "classes >= 1"),
     ({"backbone": "vgg"}, "unknown model 'vgg'")],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(change, message):
    wanted = {"kind": "fcos", "backbone": "resnet10@0.0625", "classes": 2, "size": (64, 96)} | change
    with pytest.raises(ValueError, match=message):
        kdx.build_detector(**wanted)
