"""Heatmaps lie where the object is, figures come from the fold that tested a cell."""

import math

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import call, read_rows, refused
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import datasets
import gradcam
import models

CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # row, column of a quadrant


def objects(size, texture, side=None):
    """Four images, float32 [4,3,size,size], 0 but for a patch of texture in a quadrant each."""
    side = side or size // 4
    images = torch.zeros(4, 3, size, size)
    for image, (row, column) in zip(images, CORNERS):
        top, left = (int((2 * place + 1) * size / 4 - side / 2) for place in (row, column))
        image[:, top : top + side, left : left + side] = texture[:, :side, :side]
    return images


def quadrant_shares(heat):
    """Share of the heat in each quadrant: [N, 4] of maps [N,H,W]."""
    half = heat.shape[1] // 2
    parts = [heat[:, r * half : (r + 1) * half, c * half : (c + 1) * half].sum((1, 2)) for r, c in CORNERS]
    return np.stack(parts, 1) / heat.sum((1, 2))[:, None]


def for_and_against(net):
    """Make class 0 of a network what every feature speaks for, class 1 what every feature speaks against."""
    head = net.get_submodule(models.head_name(net))
    with torch.no_grad():
        head.weight[0], head.weight[1] = 1, -1
        head.bias[:] = 0
    return net


def check_follows(net, size, threshold):
    """Without biases, a blank background has no features at all: heat for class 0 can only come from the
    object."""
    images = objects(size, torch.randn(3, size, size, generator=torch.Generator().manual_seed(1)))
    heat = gradcam.heatmaps(net, images, [0] * 4)
    assert heat.shape == (4, size, size) and heat.dtype == np.float32 and heat.min() >= 0
    assert np.allclose(heat.max((1, 2)), 1, atol=0.01) and (heat.std((1, 2)) > 0.1).all()  # not constant
    shares = quadrant_shares(heat)
    assert (shares.argmax(1) == range(4)).all() and (shares.max(1) > threshold).all(), shares


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "densenet121", "shufflenet_v2_x0_5"])
def test_heat_moves_with_the_object(name):
    torch.manual_seed(0)
    net = for_and_against(models.build_model(name, 2))
    check_follows(net, 160, 0.4)
    if name == "resnet18":  # nothing speaks for class 1, and that's what its map says
        assert gradcam.heatmaps(net, objects(160, torch.ones(3, 160, 160)), [1] * 4).max() == 0


def test_vgg_heat_moves_with_the_object():
    torch.manual_seed(0)
    net = torchvision.models.vgg11_bn(num_classes=2)
    net.classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool1d(512), torch.nn.Linear(512, 2))
    check_follows(for_and_against(net), 128, 0.5)


def patches_alike(net, image):
    """Rewire a ViT: its class token gathers all patches alike, as its last block's first norm gives them;
    what image shows speaks for class 0 and against class 1. So the map is known: it is where the object
    is."""
    last, width, features = net.encoder.layers[-1], net.hidden_dim, []
    with torch.no_grad():
        net.encoder.pos_embedding.zero_()
        net.class_token.normal_()
        for block in net.encoder.layers:
            for parameter in (*block.self_attention.out_proj.parameters(), *block.mlp[3].parameters()):
                parameter.zero_()
        last.self_attention.in_proj_weight[: 2 * width] = 0  # no patch attracts more attention than another
        last.self_attention.in_proj_weight[2 * width :] = torch.eye(width)
        last.self_attention.out_proj.weight[:] = torch.eye(width)
        hook = last.ln_1.register_forward_hook(lambda *call: features.append(call[2][0, 1:].mean(0)))
        net.eval()(image)
        hook.remove()
        net.heads.head.weight[:] = torch.stack([features[0], -features[0]])
    return net


def test_vit_heat_moves_with_the_object():
    torch.manual_seed(0)
    net, images = models.build_model("vit_b_32", 2, None, 256), objects(256, torch.randn(3, 256, 256))
    heat = gradcam.heatmaps(patches_alike(net, images[:1]), images, [0] * 4)
    shares = quadrant_shares(heat)
    assert (shares.argmax(1) == range(4)).all() and (shares.max(1) > 0.7).all(), shares
    assert gradcam.heatmaps(net, images, [1] * 4).max() == 0


@pytest.mark.parametrize(
    "name, size, layer",
    [("resnet18", 224, "layer4"), ("vit_b_32", 128, "encoder.layers.encoder_layer_11.ln_1")],
)
def test_same_maps_as_grad_cam_used_plainly(name, size, layer):
    """Stopping the gradients at the layer saves time and memory, and changes nothing."""
    torch.manual_seed(3)
    net, images = models.build_model(name, 5, None, size).eval(), torch.randn(3, 3, size, size)
    ours = gradcam.heatmaps(net, images, [0, 1, 1])
    assert ours.max() > 0 and not any(module._forward_hooks for module in net.modules())
    with GradCAM(net.requires_grad_(True), [net.get_submodule(layer)], models.cam_reshape(net)) as cam:
        theirs = cam(images, [ClassifierOutputTarget(label) for label in (0, 1, 1)])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_resnet_map_is_the_class_activation_map():
    """With average pooling before one linear layer, Grad-CAM is CAM (Zhou et al. 2016): ReLU of sum_k w_ck
    A_k."""
    torch.manual_seed(0)
    net, images = models.build_model("resnet18", 3).eval(), torch.randn(2, 3, 224, 224)
    ours, kept = gradcam.heatmaps(net, images, [2, 2]), []
    net.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        net(images)
        cam = torch.einsum("k,nkhw->nhw", net.fc.weight[2], kept[0]).relu()
        cam -= cam.amin((1, 2), keepdim=True)
        cam /= cam.amax((1, 2), keepdim=True)
        cam = torch.nn.functional.interpolate(cam[None], (224, 224), mode="bilinear")[0]
    np.testing.assert_allclose(ours, cam / cam.amax((1, 2), keepdim=True), atol=1e-3)


def test_small_images_keep_places_enough():
    """At 32 pixels a ResNet's last layer has one place, whose map would be blank: the last stage with 7 x 7
    is shown."""
    torch.manual_seed(0)
    net, images = models.build_model("resnet18", 2), torch.randn(3, 3, 32, 32)
    layer, side = gradcam.layer_for(net, images)
    assert layer is net.layer1 and side == 8
    assert gradcam.layer_for(net, torch.zeros(1, 3, 64, 64)) == (net.layer2, 8)
    heat = gradcam.heatmaps(net, images, [0, 1, 1])
    assert (heat.std((1, 2)) > 0.1).any() and heat.shape == (3, 32, 32)
    for name, last, places in (
        ("vgg11_bn", "features.27", 14),
        ("resnet18", "layer4", 7),
        ("swin_t", "permute", 7),
    ):
        net = models.build_model(name, 2)  # at full size it is the layer of the paper
        assert gradcam.layer_for(net, torch.zeros(1, 3, 224, 224)) == (net.get_submodule(last), places)


@pytest.mark.long
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_the_five_architectures_at_full_size(name):
    torch.manual_seed(0)
    net = models.build_model(name, 2)
    images = objects(224, torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(1)))
    if name.startswith("vit"):
        patches_alike(net, images[:1])
    else:
        if name.startswith("vgg"):
            net.classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool1d(512), torch.nn.Linear(512, 2))
        for_and_against(net)
    check_follows(net, 224, 0.33)  # the heat of 152 layers is broad


# ---------------------------------------------------------------- a run, its figures
RUN = ("--model", "shufflenet_v2_x0_5", "--init", "random")


def command(*args):
    call(gradcam, *args, "--device", "cpu")


def refusal(*args):
    return refused(gradcam, *args, "--device", "cpu")


def test_maps_come_from_the_fold_that_tested_the_cell(trained):
    runs, cells = trained
    folder = runs / "train" / "shufflenet_v2_x0_5" / "random"
    classes, tested = gradcam.read_run(folder)
    assert sorted(cell["path"] for cell in tested) == sorted(cells.paths)  # each once
    cell = next(cell for cell in tested if cell["prediction"] != cell["label"])
    gradcam.add_heatmaps([cell], classes, cells, "cpu")
    row = next(row for row in read_rows(runs / "split.csv") if row["path"] == cell["path"])
    net, info = models.load_checkpoint(folder / ("fold0" if row["fold0"] == "test" else "fold1") / "best.pt")
    image = torch.from_numpy(datasets.resize(cells[list(cells.paths).index(cell["path"])], 64))
    image = datasets.normalise(image.permute(2, 0, 1)[None], info["mean"], info["std"])
    for label in (cell["label"], cell["prediction"]):  # one map for each of both
        heat = gradcam.heatmaps(net, image, [classes.index(label)])[0]
        np.testing.assert_allclose(cell["heatmaps"][label], heat, atol=1e-5)


def test_a_figure_of_the_chosen_cell(trained, capsys):
    runs, cells = trained
    options, path = (*RUN, "--runs", runs, "--data", cells.root), str(cells.paths[0])
    command(*options, "--paths", path)
    file = runs / "results" / f"gradcam_shufflenet_v2_x0_5_random_{path[:3]}.png"
    assert capsys.readouterr().out == f"{file}\n" and min(cv2.imread(str(file)).shape[:2]) > 400
    assert "--data" in refusal(*options[:-1], cells.root.parent.parent / "cd", "--paths", path)
    assert "no tested image" in refusal(*options, "--paths", "NGS/none.jpg")
    assert "no class" in refusal(*options, "--classes", "XYZ")
    assert "no finished fold" in refusal(*options[:3], "cd", *options[4:])


def test_the_best_row_of_table_4_and_the_classes_of_figs_5_and_6(trained, tmp_path, monkeypatch):
    """Most folds first: a row of two lucky folds is no winner."""
    runs, cells = trained
    shown = []
    monkeypatch.setattr(gradcam, "draw_figure", lambda file, *rest: shown.append(file.name))
    monkeypatch.setattr(gradcam, "add_heatmaps", lambda *rest: None)
    monkeypatch.setattr(gradcam, "open_images", lambda *rest: None)
    command(*RUN, "--runs", runs, "--data", cells.root)
    assert shown == [f"gradcam_shufflenet_v2_x0_5_random_{label}.png" for label in ("FGC", "BAS")]
    for init in ("random", "cd", "pcam"):
        fold = tmp_path / "train" / "resnet18" / init / "fold0"
        fold.mkdir(parents=True)
        (fold / "predictions.csv").write_text("path,label,prediction,p_x,p_y,p_z\nx/1.png,x,y,0.2,0.7,0.1\n")
    assert "first run evaluate.py" in refusal("--runs", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/table4.csv").write_text(
        "model,init,folds,f1_mean\nresnet18,random,5,0.5\nresnet18,cd,2,0.9\nresnet18,pcam,5,0.6\n"
    )
    command("--runs", tmp_path, "--data", cells.root)
    assert shown[2:] == ["gradcam_resnet18_pcam_x.png"]  # the first two of other classes; no y was tested
    with pytest.raises(SystemExit) as caught:
        command("--runs", tmp_path, "--model", "resnet18")
    assert caught.value.code == 2


def sheet(monkeypatch, tmp_path, right, wrong):
    """The figure of so many right and wrong cells: (matplotlib's Figure, PNG's size)."""
    figures, make = [], gradcam.Figure

    def keep(**options):
        figures.append(make(**options))
        return figures[-1]

    monkeypatch.setattr(gradcam, "Figure", keep)
    cell = {"path": "x/1.png", "label": "x", "fold": tmp_path, "p": np.array([0.3, 0.7]), "side": 7}
    cell["picture"], heat = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=np.float32)
    cells = [cell | {"prediction": "x", "heatmaps": {"x": heat}}] * right
    others = [cell | {"prediction": "y", "heatmaps": {"y": heat, "x": heat}}] * wrong
    halves = ("right", cells), ("wrong", others)
    gradcam.draw_figure(tmp_path / "1.png", "x", ("model", "init"), ["x", "y"], *halves)
    return figures[-1], cv2.imread(str(tmp_path / "1.png")).shape


@pytest.mark.parametrize("right, wrong", [(6, 1), (6, 6), (0, 2), (3, 0)])
def test_a_figure_has_as_many_rows_as_its_cells_fill(monkeypatch, tmp_path, right, wrong):
    """Six pictures a row: three right cells of two, or two wrong ones of three."""
    figure, (height, width, _) = sheet(monkeypatch, tmp_path, right, wrong)
    rows = math.ceil(right / 3) + math.ceil(wrong / 2)
    assert len(figure.axes) == 6 * rows
    assert sum(bool(axis.images) for axis in figure.axes) == 2 * right + 3 * wrong
    assert height < 290 * rows + 250 and width == 1500


def test_more_cells_than_a_figure_holds_are_cut_and_it_is_said(trained, monkeypatch, capsys):
    runs, cells = trained
    drawn = []
    monkeypatch.setattr(gradcam, "MOST", 2)
    monkeypatch.setattr(gradcam, "draw_figure", lambda *drawing: drawn.extend(drawing[4:]))
    monkeypatch.setattr(gradcam, "add_heatmaps", lambda *rest: None)
    command(*RUN, "--runs", runs, "--data", cells.root, "--count", "1000", "--classes", "NGS")
    sizes = [len(group) for _, group in drawn]
    said = capsys.readouterr().out
    assert max(sizes) == 2 and said.count("shown, the most that a figure holds") == sizes.count(2)


def test_most_and_least_confident_cells_are_chosen():
    cells = [{"p": np.array([p, 1 - p])} for p in (0.6, 0.9, 0.7, 0.99, 0.8, 0.55)]
    assert [cell["p"][0] for cell in gradcam.choose(cells, 4)] == [0.99, 0.9, 0.6, 0.55]
    assert [cell["p"][0] for cell in gradcam.choose(cells, 3)] == [0.99, 0.9, 0.55]
    assert len(gradcam.choose(cells, 10)) == 6
