import pytest
import torch

import kdx
from kdx.explain.detection_cam import score_gradients
from kdx.networks.fpn_detectors import watch_levels
from tests.boxes import squares
from tests.networks import state

IMAGES = squares(3).images
STEP = 1e-5


@pytest.fixture(scope="module", params=["fcos", "retinanet"])
def detector(request):
    detector = kdx.build_detector(request.param, "resnet10@0.0625", 2, (64, 96), seed=0).eval()
    detector.score_thresh = 0.0
    detector.detections_per_img = 20
    return detector


def scores(detector, images, change=None):
    """The scores that are kept for float64 images, with a change of one value of a level."""

    def hook(module, args, levels):
        if change:
            level, place = change
            levels = dict(levels)
            levels[level] = levels[level].clone()
            levels[level][place] += STEP
        return levels

    handle = detector.backbone.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return [one["scores"] for one in detector(list(images.double() / 255))]
    finally:
        handle.remove()


@pytest.mark.parametrize("box", [None, 0])
def test_gradients_are_finite_differences(detector, box):
    detector.double()
    boxes = None if box is None else [box] * 3
    found = score_gradients(detector, IMAGES, boxes)
    take = lambda parts: sum(part.sum() if box is None else part[box] for part in parts).item()  # noqa: E731
    before = take(scores(detector, IMAGES))
    checked = 0
    for level in ("P3", "P4"):
        gradient = found[level][1]
        for place in gradient.abs().flatten().topk(2).indices if gradient.any() else []:
            index = tuple(int(i) for i in torch.unravel_index(place, gradient.shape))
            slope = (take(scores(detector, IMAGES, (level, index))) - before) / STEP
            assert gradient[index].item() == pytest.approx(slope, rel=1e-2)
            checked += 1
    assert checked >= 2
    detector.float()


def test_a_map_is_that_of_its_image_and_of_grad_cams_definition(detector):
    maps = kdx.detection_cam(detector, IMAGES)
    found = score_gradients(detector, IMAGES)
    for level, (features, gradient) in found.items():
        weights = gradient.mean((2, 3))
        torch.testing.assert_close(maps[level], torch.einsum("nk,nkhw->nhw", weights, features).relu())
    hires = kdx.detection_cam(detector, IMAGES, method="hires")
    torch.testing.assert_close(hires["P3"], (found["P3"][0] * found["P3"][1]).sum(1).relu())
    detector.double()  # in float32, rounding can change which of nearly equal detections are kept
    together, alone = (kdx.detection_cam(detector, images) for images in (IMAGES, IMAGES[1:2]))
    detector.float()
    for level, of_all in together.items():
        torch.testing.assert_close(of_all[1:2], alone[level], rtol=1e-3, atol=1e-5 * float(of_all.max()) + 1e-12)


def test_one_box_of_all_is_a_part_of_the_sum(detector):
    count = [len(s) for s in scores(detector.double(), IMAGES)]
    detector.float()
    least = min(count)
    assert least >= 2
    single = [score_gradients(detector, IMAGES[:1], [i])["P3"][1] for i in range(count[0])]
    torch.testing.assert_close(sum(single), score_gradients(detector, IMAGES[:1])["P3"][1], rtol=1e-3, atol=1e-6)


def test_what_a_coarser_level_finds_shows_at_p5_alone():
    detector = kdx.build_detector("fcos", "resnet10@0.0625", 2, (128, 192), seed=0).eval()
    detector.score_thresh = 0.0
    images = squares(2, (128, 192)).images
    sizes = []

    def coarsest_alone(module, args, outputs):
        sizes.extend(outputs["cls_logits"].shape[1:2])
        logits = outputs["cls_logits"].clone()
        logits[:, : -2 * 3] = -20.0  # all places but those at 1/64 of the image
        return outputs | {"cls_logits": logits}

    detector.head.register_forward_hook(coarsest_alone)
    found = score_gradients(detector, images, [0, 0])
    assert sizes == [16 * 24 + 8 * 12 + 4 * 6 + 2 * 3]
    assert {level: bool(gradient.any()) for level, (_, gradient) in found.items()} == {
        "P3": False, "P4": False, "P5": True,
    }  # fmt: skip


def test_where_nothing_is_found_maps_are_empty():
    blind = kdx.build_detector("fcos", "resnet10@0.0625", 2, (64, 96), seed=0)
    blind.score_thresh = 1.0
    assert all(not of.any() for of in kdx.detection_cam(blind, IMAGES).values())
    with pytest.raises(ValueError, match=r"expected one of \[0, 0, 0\] detections each"):
        kdx.detection_cam(blind, IMAGES, [0, 0, 0])


def test_the_detector_is_left_as_it_was(detector):
    detector.train()
    for parameter in detector.parameters():
        parameter.requires_grad_(False)
    before = state(detector)
    with torch.inference_mode():
        maps = kdx.detection_cam(detector, IMAGES)
    assert state(detector) == before
    assert maps["P3"].any()
    detector.eval()


def test_wrong_input(detector):
    with pytest.raises(ValueError, match="unknown method 'grad'"):
        kdx.detection_cam(detector, IMAGES, method="grad")
    with pytest.raises(TypeError, match="expected uint8 images"):
        kdx.detection_cam(detector, IMAGES / 255)
    with pytest.raises(ValueError, match="feature pyramid"), watch_levels(torch.nn.Identity()):
        pass
