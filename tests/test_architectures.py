"""The five architectures as the paper used them: Table 3, the new last layer, a step, a prediction."""

import gc
import re
import sys

import demo_data
import numpy as np
import pytest
import torch
import torchvision

import datasets
import models

PAPER = {  # Table 3 as printed
    "vgg19_bn": (74.218, 91.842, 143_678_248),
    "resnet152": (82.284, 96.002, 60_192_808),
    "regnet_y_32gf": (83.368, 96.498, 145_046_770),
    "vit_l_32": (76.972, 93.07, 306_535_400),
}
HEADS = {
    "vgg19_bn": ("classifier.6", 4096),
    "resnet152": ("fc", 2048),
    "regnet_y_32gf": ("fc", 3712),
    "vit_l_32": ("heads.head", 1024),
    "resnext50_32x4d": ("fc", 2048),
}
GRIDS = {
    "vgg19_bn": (512, 14, 14),
    "resnet152": (2048, 7, 7),
    "regnet_y_32gf": (3712, 7, 7),
    "vit_l_32": (1024, 7, 7),
    "resnext50_32x4d": (2048, 7, 7),
}


def test_table_3_is_what_the_chosen_weights_reach():
    for name, (acc1, acc5, parameters) in PAPER.items():
        meta = models.find_weights(name).meta
        assert meta["_metrics"]["ImageNet-1K"] == {"acc@1": acc1, "acc@5": acc5}
        assert meta["num_params"] == parameters


def test_the_script_prints_table_3(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models.py"])
    models.main()
    lines = capsys.readouterr().out.splitlines()
    for name, values in PAPER.items():
        line = next(line for line in lines if line.startswith(name))
        numbers = [float(cell.replace(",", "")) for cell in re.findall(r"(?<= )[\d.,]+(?= )", line)]
        assert numbers == list(values)


def cells(size=224):
    """A batch of two cells, uint8 [2,3,size,size]."""
    drawn = [demo_data.draw_cell(code, seed=0, number=1)[0] for code in ("BAS", "FGC")]
    images = [datasets.resize(image, size) for image in drawn]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def check(name, net, seen):
    """The new head, the number of parameters, and the grid of a forward pass's output (seen)."""
    head, inputs = HEADS[name]
    layer = net.get_submodule(head)
    assert models.head_name(net) == head and type(layer) is torch.nn.Linear
    assert (layer.in_features, layer.out_features) == (inputs, 21)
    if name in PAPER:  # the rest is torchvision's: 21 instead of 1,000 units
        assert sum(p.numel() for p in net.parameters()) == PAPER[name][2] - (1000 - 21) * (inputs + 1)
    grid = (models.cam_reshape(net) or (lambda tensor: tensor))(seen)
    assert grid.shape == (2, *GRIDS[name])  # the last grid before places are pooled away


@pytest.mark.parametrize("name", ["vgg19_bn", "vit_l_32", "resnet152", "resnext50_32x4d"])
def test_head_parameters_and_grid_without_numbers(name):
    """On PyTorch's meta device, where tensors have shapes alone (RegNet computes its widths with numbers)."""
    with torch.device("meta"):
        net = models.build_model(name, 21).eval()
        seen = []
        models.cam_layer(net).register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():
            assert net(torch.zeros(2, 3, 224, 224)).shape == (2, 21)
    check(name, net, seen[0])


@pytest.mark.long
@pytest.mark.parametrize("name", HEADS)
def test_one_step_and_one_prediction(name):
    torch.manual_seed(0)
    net = models.build_model(name, 21)
    seen = []
    models.cam_layer(net).register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    first, last = next(iter(net.named_parameters()))[0], HEADS[name][0] + ".weight"
    before = {key: net.get_parameter(key).detach().clone() for key in (first, last)}
    net.train()
    images = datasets.normalise(cells(), [0.5] * 3, [0.25] * 3)
    loss = torch.nn.functional.cross_entropy(net(images), torch.tensor([5, 20]))
    loss.backward()
    optimiser.step()
    assert loss.isfinite()
    assert not any(torch.equal(net.get_parameter(key), tensor) for key, tensor in before.items())
    optimiser.zero_grad()
    with torch.inference_mode():
        logits = net.eval()(images)
    assert logits.shape == (2, 21) and logits.isfinite().all() and not torch.equal(logits[0], logits[1])
    check(name, net, seen[0])
    seen.clear()
    del net, optimiser, loss, logits, before
    gc.collect()


def test_vgg_looks_at_the_last_relu_before_the_pooling():
    with torch.device("meta"):
        features = models.build_model("vgg19_bn", 2).features
        net = torchvision.models.vgg11_bn(num_classes=2)
    last = max(i for i, layer in enumerate(features) if isinstance(layer, torch.nn.ReLU))
    assert isinstance(features[last + 1], torch.nn.MaxPool2d) and last + 2 == len(features)
    assert models.cam_layer(net) is net.features[-2]


def test_tokens_become_the_grid_that_they_came_from():
    with torch.device("meta"):
        net = models.build_model("vit_b_32", 2, None, 96)
    patches = torch.arange(9.0).reshape(1, 9, 1)  # row by row, as torchvision cuts an image into patches
    tokens = torch.cat([torch.full((1, 1, 1), -1.0), patches], 1)  # the class token comes first
    assert torch.equal(models.cam_reshape(net)(tokens)[0, 0], torch.arange(9.0).reshape(3, 3))


OTHERS = "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5"
OTHERS += " mobilenet_v2 shufflenet_v2_x0_5 squeezenet1_1 swin_t regnet_x_400mf"
SIZES = {"alexnet": 96, "inception_v3": 107, "maxvit_t": 224}


@pytest.mark.parametrize("name", OTHERS.split())
def test_any_other_torchvision_model(name):
    size = SIZES.get(name, 64)
    net = models.build_model(name, 5, None, size).eval()
    seen = []
    models.cam_layer(net).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        assert net(torch.randn(1, 3, size, size)).shape == (1, 5)
    models.check_forward(name, size, 2)
    _, channels, height, width = seen[0].shape
    assert channels > height == width > 1


def test_names_and_sizes_that_do_not_exist():
    for args, named in (
        (("resnet153",), "resnet152"),
        (("fasterrcnn_resnet50_fpn",), "no classification model"),
        (("ResNet18",), "resnet18"),
        (("resnet18", "V3"), "IMAGENET1K_V1"),
    ):
        with pytest.raises(ValueError, match=named):
            models.check_name(*args)


def test_what_a_network_cannot_train_on_is_said_before_anything_is_read():
    """Pooling without pixels, a kernel larger than its input, batch norm of one value, half a patch."""
    for args in (("alexnet", 32, 4), ("inception_v3", 64, 4), ("resnet18", 32, 1), ("vit_b_16", 100, 2)):
        with pytest.raises(
            ValueError, match=f"{args[0]} cannot be trained with {args[2]} images of {args[1]}"
        ):
            models.check_forward(*args)
    models.check_forward("resnet18", 64, 1)  # 2 x 2 places, so four values


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("regnet_y_32gf", "resnet152") else pytest.param(name, marks=pytest.mark.long)
        for name in models.ARCHITECTURES
    ],
)
def test_the_papers_networks_train_on_its_images(name):
    models.check_forward(name, 224, 32)
