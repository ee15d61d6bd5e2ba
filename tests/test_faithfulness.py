"""Are the heatmaps faithful? On synthetic cells it is known which structure decides the class.

    python -m pytest -m long -s tests/test_faithfulness.py          prints the table

Measured is the energy version of the pointing game: the share of a map's heat inside the deciding structure, over that
structure's share of the area (1: the map knows nothing), on test cells that the trained network classifies correctly;
the same with random weights (sanity check of Adebayo et al. 2018) on the same centred cells, and for a wrong class.
ROAD (Rong et al. 2022) needs no mask: how much more the confidence falls when the hottest pixels are blurred out than
when the coldest are, so that more is better.
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
import gradcam
import models
import engine
import train

pytestmark = pytest.mark.long
CLASSES = ["FGC", "BAS", "EOS", "LYT", "ART", "KSC", "PMO", "NGS"]
NUMBER = 100  # cells of a class: 70 to train, 10 to validate, 20 to test
MEAN, STD = [0.75, 0.70, 0.80], [0.20, 0.25, 0.18]


def draw(size):
    """(training, validation, test cells; masks float [N,size,size] of the test cells)."""
    images, masks = {}, {}
    for code in CLASSES:
        for number in range(NUMBER):
            image, mask = demo_data.draw_cell(code, seed=7, number=number)
            images[f"{code}/{number}"] = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            masks[f"{code}/{number}"] = cv2.resize(
                np.float32(mask), (size, size), interpolation=cv2.INTER_AREA
            )
    cells = datasets.Cells(
        ".",
        "synthetic",
        CLASSES,
        list(images),
        np.repeat(range(len(CLASSES)), NUMBER),
        read=images.__getitem__,
    )
    number = np.arange(len(cells)) % NUMBER
    test = cells.subset(number >= 80)
    return (
        cells.subset(number < 70),
        cells.subset((number >= 70) & (number < 80)),
        test,
        np.array([masks[path] for path in test.paths]),
    )


def build_cnn():
    return models.build_model("resnet18", len(CLASSES), None, 64)


def build_vit(size, patch):
    net = torchvision.models.VisionTransformer(size, patch, 4, 4, 128, 256, num_classes=len(CLASSES))
    net.heads.head = torch.nn.Linear(
        128, len(CLASSES)
    )  # torchvision's is all zeros: random weights would have no map
    return net


def maps(net, inputs, labels):
    """(maps float [N,H,W], which of them are not empty)."""
    parts = np.array_split(labels, range(32, len(labels), 32))
    heat = np.concatenate(
        [gradcam.heatmaps(net, batch, part) for batch, part in zip(inputs.split(32), parts)]
    )
    return heat, heat.sum((1, 2)) > 0


def inside(heat, masks):
    """Share of the heat inside the masks over the masks' share of the area, of all maps together."""
    shares = (heat * masks).sum((1, 2)) / heat.sum((1, 2))
    return shares.mean(), masks.mean(), shares.mean() / masks.mean()


def road(net, inputs, heat, labels):
    """Mean ROAD of some maps: (fall for the hottest - fall for the coldest pixels) / 2, in units of confidence."""
    metric = ROADCombined(percentiles=[20, 40, 60, 80])
    with torch.inference_mode():
        return float(
            np.mean(
                [
                    metric(
                        inputs[i : i + 1],
                        heat[i : i + 1],
                        [ClassifierOutputSoftmaxTarget(int(labels[i]))],
                        net,
                    )
                    for i in range(0, len(labels), 6)
                ]
            )
        )


@pytest.mark.parametrize(
    "name, size, epochs, build, gap",
    [
        ("CNN (ResNet-18), 8 x 8 places", 64, 15, build_cnn, 1.3),
        ("ViT, 12 x 12 patches", 96, 24, lambda: build_vit(96, 8), 1.1),
        (
            "ViT, 7 x 7 patches",
            112,
            24,
            lambda: build_vit(112, 16),
            1.1,
        ),  # as coarse as ViT-L/32's: says little
    ],
)
def test_share_of_heat_inside_the_deciding_structure(name, size, epochs, build, gap, tmp_path):
    training, validation, test, masks = draw(size)
    torch.manual_seed(0)
    net = build()
    engine.fit(
        tmp_path,
        net,
        training,
        validation,
        lr=0.02,
        epochs=epochs,
        batch_size=16,
        image_size=size,
        mean=MEAN,
        std=STD,
    )
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
    for kind, network, labels in (
        ("trained, true class", net, truth),
        ("random weights", untrained, truth),
        ("trained, wrong class", net, wrong),
    ):
        heat, full = maps(network, inputs, labels)
        share, area, ratio[kind] = inside(heat[right & full], masks[right & full])
        each[kind] = {
            code: inside(heat[k], masks[k])[2]
            for code in CLASSES
            if (k := right & full & (truth == CLASSES.index(code))).any()
        }
        roads[kind] = road(net, inputs[right], heat[right], truth[right])
        print(
            f"{kind:<28}{share:>8.3f}{area:>8.3f}{ratio[kind]:>8.2f}{(~full)[right].mean():>8.0%}{roads[kind]:>8.3f}"
        )
    print(", ".join(f"{code} {value:.2f}" for code, value in each["trained, true class"].items()))
    if name.startswith("CNN"):  # small structures: Auer rods and granules, as in Figs. 5 and 6
        assert min(each["trained, true class"][code] for code in ("FGC", "BAS")) > 1.3
    assert ratio["trained, true class"] > 1.6 and roads["trained, true class"] > 0.15
    for control in ("random weights", "trained, wrong class"):
        assert ratio["trained, true class"] > gap * ratio[control]
        assert roads["trained, true class"] > 0.03 + roads[control]
