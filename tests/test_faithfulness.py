"""Are the heatmaps faithful? On synthetic cells it is known which structure decides the class.

    python -m pytest -m long -s tests/test_faithfulness.py          prints the table

Measured is the energy form of the pointing game: the share of a map's heat inside the deciding structure, in
units of its share of the area (1: the map knows nothing), on test cells that the trained network gets right;
the same with random weights (sanity check of Adebayo et al. 2018) on these cells, and for a wrong class. ROAD
(Rong et al. 2022) needs no mask: how much more confidence falls with the hottest pixels blurred than with
the coldest, so that more is better.
"""

import cv2
import demo_data
import numpy as np
import pytest
import torch
import torchvision
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

import datasets
import engine
import gradcam
import models

pytestmark = pytest.mark.long
CLASSES = ["FGC", "BAS", "EOS", "LYT", "ART", "KSC", "PMO", "NGS"]
NUMBER = 100  # cells of a class: 70 to train, 10 to validate, 20 to test
MEAN, STD = [0.75, 0.70, 0.80], [0.20, 0.25, 0.18]


def draw(size):
    """(training, validation, test cells; masks float [N,size,size] of the test cells)."""
    images, masks = {}, {}

    def shrink(picture):
        return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)

    for code in CLASSES:
        for number in range(NUMBER):
            image, mask = demo_data.draw_cell(code, seed=7, number=number)
            images[f"{code}/{number}"], masks[f"{code}/{number}"] = shrink(image), shrink(np.float32(mask))
    targets = np.repeat(range(len(CLASSES)), NUMBER)
    cells = datasets.Cells(".", "synthetic", CLASSES, list(images), targets, read=images.__getitem__)
    number = np.arange(len(cells)) % NUMBER
    parts = [cells.subset(part) for part in (number < 70, (number >= 70) & (number < 80), number >= 80)]
    return (*parts, np.array([masks[path] for path in parts[2].paths]))


def build_cnn():
    return models.build_model("resnet18", len(CLASSES), None, 64)


def build_vit(size, patch):
    net = torchvision.models.VisionTransformer(size, patch, 4, 4, 128, 256, num_classes=len(CLASSES))
    net.heads.head = torch.nn.Linear(128, len(CLASSES))  # torchvision's is all zeros: there would be no map
    return net


def maps(net, inputs, labels):
    """(maps float [N,H,W], which of them are not empty)."""
    parts = np.array_split(labels, range(32, len(labels), 32))
    batches = zip(inputs.split(32), parts)
    heat = np.concatenate([gradcam.heatmaps(net, batch, part) for batch, part in batches])
    return heat, heat.sum((1, 2)) > 0


def inside(heat, masks):
    """Share of the heat inside the masks over the masks' share of the area, of all maps together."""
    shares = (heat * masks).sum((1, 2)) / heat.sum((1, 2))
    return shares.mean(), masks.mean(), shares.mean() / masks.mean()


def road(net, inputs, heat, labels):
    """Mean ROAD of some maps: (fall for the hottest - fall for the coldest pixels) / 2, of the confidence."""
    metric, falls = ROADCombined(percentiles=[20, 40, 60, 80]), []
    with torch.inference_mode():
        for i in range(0, len(labels), 6):
            target = [ClassifierOutputSoftmaxTarget(int(labels[i]))]
            falls.append(metric(inputs[i : i + 1], heat[i : i + 1], target, net))
    return float(np.mean(falls))


NETWORKS = [
    ("CNN (ResNet-18), 8 x 8 places", 64, 15, build_cnn, 1.3),
    ("ViT, 12 x 12 patches", 96, 24, lambda: build_vit(96, 8), 1.1),
    ("ViT, 7 x 7 patches", 112, 24, lambda: build_vit(112, 16), 1.1),  # as coarse as ViT-L/32's: says little
]


@pytest.mark.parametrize("name, size, epochs, build, gap", NETWORKS)
def test_share_of_heat_inside_the_deciding_structure(name, size, epochs, build, gap, tmp_path):
    training, validation, test, masks = draw(size)
    torch.manual_seed(0)
    net = build()
    settings = {"lr": 0.02, "batch_size": 16, "image_size": size, "mean": MEAN, "std": STD}
    engine.fit(tmp_path, net, training, validation, epochs=epochs, **settings)
    torch.manual_seed(1)
    untrained = build().eval()
    inputs = torch.from_numpy(np.stack([test[i] for i in range(len(test))])).permute(0, 3, 1, 2)
    inputs, truth = datasets.normalise(inputs, MEAN, STD), test.targets
    with torch.inference_mode():
        right = np.concatenate([net.eval()(batch).argmax(1) for batch in inputs.split(32)]) == truth
    assert right.mean() > 0.75
    wrong = (truth + np.random.default_rng(0).integers(1, len(CLASSES), len(truth))) % len(CLASSES)
    print(
        f"\n{name}: {right.sum()} of {len(right)} test cells, those classified correctly\n"
        f"{'map':<28}{'inside':>8}{'area':>8}{'ratio':>8}{'empty':>8}{'ROAD':>8}"
    )
    ratio, roads, each = {}, {}, {}
    cases = [("trained, true class", net, truth), ("random weights", untrained, truth)]
    for kind, network, labels in [*cases, ("trained, wrong class", net, wrong)]:
        heat, full = maps(network, inputs, labels)
        share, area, ratio[kind] = inside(heat[right & full], masks[right & full])
        kept = {code: right & full & (truth == number) for number, code in enumerate(CLASSES)}
        each[kind] = {code: inside(heat[k], masks[k])[2] for code, k in kept.items() if k.any()}
        roads[kind] = road(net, inputs[right], heat[right], truth[right])
        text = f"{kind:<28}{share:>8.3f}{area:>8.3f}{ratio[kind]:>8.2f}{(~full)[right].mean():>8.0%}"
        print(f"{text}{roads[kind]:>8.3f}")
    print(", ".join(f"{code} {value:.2f}" for code, value in each["trained, true class"].items()))
    if name.startswith("CNN"):  # small structures: Auer rods and granules, as in Figs. 5 and 6
        assert min(each["trained, true class"][code] for code in ("FGC", "BAS")) > 1.3
    assert ratio["trained, true class"] > 1.6 and roads["trained, true class"] > 0.15
    for control in ("random weights", "trained, wrong class"):
        assert ratio["trained, true class"] > gap * ratio[control]
        assert roads["trained, true class"] > 0.03 + roads[control]
