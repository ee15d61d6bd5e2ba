"""Heatmaps lie where the object is, figures come from the fold that tested a cell, new images are judged honestly."""
import csv
import shutil
import sys

import cv2
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import torchvision
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import datasets
import gradcam
import models
import splits

CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # row, column of a quadrant


def objects(size, texture, side=None):
    """Four images, float32 [4,3,size,size], 0 but for a patch of texture in the middle of one quadrant each."""
    side = side or size // 4
    images = torch.zeros(4, 3, size, size)
    for image, (row, column) in zip(images, CORNERS):
        top, left = (int((2 * place + 1) * size / 4 - side / 2) for place in (row, column))
        image[:, top:top + side, left:left + side] = texture[:, :side, :side]
    return images


def quadrant_shares(heat):
    """Share of the heat in each quadrant: [N, 4] of maps [N,H,W]."""
    half = heat.shape[1] // 2
    parts = [heat[:, r * half:(r + 1) * half, c * half:(c + 1) * half].sum((1, 2)) for r, c in CORNERS]
    return np.stack(parts, 1) / heat.sum((1, 2))[:, None]


def for_and_against(net):
    """Make class 0 of a network what every feature speaks for, class 1 what every feature speaks against."""
    head = net.get_submodule(models.head_name(net))
    with torch.no_grad():
        head.weight[0], head.weight[1] = 1, -1
        head.bias[:] = 0
    return net


def check_follows(net, size, threshold):
    """Without biases, a blank background has no features at all: heat for class 0 can only come from the object."""
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
    """Rewire a ViT: its class token gathers all patches alike, as its last block's first norm gives them; what image
    shows speaks for class 0 and against class 1. So the map is known: it is where the object is.
    """
    last, width, features = net.encoder.layers[-1], net.hidden_dim, []
    with torch.no_grad():
        net.encoder.pos_embedding.zero_()
        net.class_token.normal_()
        for block in net.encoder.layers:
            for parameter in (*block.self_attention.out_proj.parameters(), *block.mlp[3].parameters()):
                parameter.zero_()
        last.self_attention.in_proj_weight[:2 * width] = 0  # no patch attracts more attention than another
        last.self_attention.in_proj_weight[2 * width:] = last.self_attention.out_proj.weight[:] = torch.eye(width)
        hook = last.ln_1.register_forward_hook(lambda module, inputs, output: features.append(output[0, 1:].mean(0)))
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


@pytest.mark.parametrize("name, layer", [("resnet18", "layer4"), ("vit_b_32", "encoder.layers.encoder_layer_11.ln_1")])
def test_same_maps_as_grad_cam_used_plainly(name, layer):
    """Stopping the gradients at the layer saves time and memory, and changes nothing."""
    torch.manual_seed(3)
    net, images = models.build_model(name, 5, None, 128).eval(), torch.randn(3, 3, 128, 128)
    ours = gradcam.heatmaps(net, images, [0, 1, 1])
    assert ours.max() > 0 and not any(module._forward_hooks for module in net.modules())
    with GradCAM(net.requires_grad_(True), [net.get_submodule(layer)], models.cam_reshape(net)) as cam:
        np.testing.assert_allclose(ours, cam(images, [ClassifierOutputTarget(label) for label in (0, 1, 1)]), atol=1e-5)


def test_resnet_map_is_the_class_activation_map():
    """With average pooling before one linear layer, Grad-CAM is CAM (Zhou et al. 2016): ReLU of sum_k w_ck A_k."""
    torch.manual_seed(0)
    net, images = models.build_model("resnet18", 3).eval(), torch.randn(2, 3, 128, 128)
    ours, kept = gradcam.heatmaps(net, images, [2, 2]), []
    net.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        net(images)
        cam = torch.einsum("k,nkhw->nhw", net.fc.weight[2], kept[0]).relu()
        cam -= cam.amin((1, 2), keepdim=True)
        cam /= cam.amax((1, 2), keepdim=True)
        cam = torch.nn.functional.interpolate(cam[None], (128, 128), mode="bilinear")[0]
    np.testing.assert_allclose(ours, cam / cam.amax((1, 2), keepdim=True), atol=1e-3)


def test_small_images_keep_places_enough():
    """At 32 pixels a ResNet's last layer has one place, whose map would be blank: the last stage with 4 x 4 is shown."""
    torch.manual_seed(0)
    net, images = models.build_model("resnet18", 2), torch.randn(3, 3, 32, 32)
    layer, side = gradcam.layer_for(net, images)
    assert layer is net.layer2 and side == 4
    heat = gradcam.heatmaps(net, images, [0, 1, 1])
    assert (heat.std((1, 2)) > 0.1).any() and heat.shape == (3, 32, 32)
    for name, last, places in (("vgg11_bn", "features.27", 14), ("resnet18", "layer4", 7), ("swin_t", "permute", 7)):
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
@pytest.fixture(scope="module")
def study(tmp_path_factory, demo):
    """Two trained folds of a small network on the demo's bone marrow cells: (runs folder, its data)."""
    import train
    runs, cells = tmp_path_factory.mktemp("runs"), datasets.open_dataset(demo / "bm")
    labels = [cells.classes[target] for target in cells.targets]
    splits.write_splits(runs / "split.csv", cells.paths, labels, splits.make_splits(cells.targets, folds=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, (
            "--model", "shufflenet_v2_x0_5", "--init", "random", "--data", demo / "bm", "--runs", runs, "--epochs", 2,
            "--image-size", 64, "--lr", 0.05, "--workers", 0, "--device", "cpu", "--amp", "off"))])
        train.main()
    return runs, cells


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["gradcam.py", *map(str, args), "--device", "cpu"])
    gradcam.main()


def refusal(monkeypatch, *args):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *args)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code, caught.value.code
    return caught.value.code


def read(file):
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as handle:
        return list(csv.DictReader(handle))


def parts_of(runs, fold):
    """{path: train, val or test} of one fold."""
    paths, _, parts = splits.read_splits(runs / "split.csv")
    return dict(zip(paths, parts[:, fold]))


def checkpoint(runs, fold):
    return runs / "train" / "shufflenet_v2_x0_5" / "random" / f"fold{fold}" / "best.pt"


@pytest.mark.long
def test_figures_come_from_the_fold_that_tested_the_cell(study, monkeypatch, capsys):
    runs, cells = study
    run = ("--model", "shufflenet_v2_x0_5", "--init", "random", "--runs", runs, "--data", cells.root)
    command(monkeypatch, *run, "--classes", "NGS", "BLA")
    said = capsys.readouterr().out
    for label in ("NGS", "BLA"):
        file = runs / "results" / f"gradcam_shufflenet_v2_x0_5_random_{label}.png"
        assert str(file) in said
        assert min(cv2.imread(str(file)).shape[:2]) > 400
    classes, tested = gradcam.read_run(checkpoint(runs, 0).parent.parent)
    assert sorted(cell["path"] for cell in tested) == sorted(cells.paths)  # each once
    cell = next(cell for cell in tested if cell["prediction"] != cell["label"])
    gradcam.add_heat([cell], classes, cells, "cpu", 4)
    fold = 0 if parts_of(runs, 0)[cell["path"]] == "test" else 1
    net, info = models.load_checkpoint(checkpoint(runs, fold))
    index = list(cells.paths).index(cell["path"])
    image = torch.from_numpy(datasets.resize(cells[index], 64)).permute(2, 0, 1)[None]
    for label in (cell["label"], cell["prediction"]):  # one map for each of both
        heat = gradcam.heatmaps(net, datasets.normalise(image, info["mean"], info["std"]), [classes.index(label)])[0]
        np.testing.assert_allclose(cell["heat"][label], heat, atol=1e-5)
    (runs / "results" / f"gradcam_shufflenet_v2_x0_5_random_{cell['label']}.png").unlink(missing_ok=True)
    command(monkeypatch, *run, "--paths", cell["path"])
    assert (runs / "results" / f"gradcam_shufflenet_v2_x0_5_random_{cell['label']}.png").exists()
    assert "--data" in refusal(monkeypatch, *run[:-1], cells.root.parent.parent / "cd", "--paths", cell["path"])
    assert "no tested image" in refusal(monkeypatch, *run, "--paths", "NGS/none.jpg")
    assert "no class" in refusal(monkeypatch, *run, "--classes", "XYZ")
    assert "no finished fold" in refusal(monkeypatch, *run[:3], "cd", *run[4:], "--classes", "NGS")


def test_most_and_least_confident_cells_are_chosen():
    cells = [{"p": np.array([p, 1 - p])} for p in (0.6, 0.9, 0.7, 0.99, 0.8, 0.55)]
    assert [cell["p"][0] for cell in gradcam.choose(cells, 4)] == [0.99, 0.9, 0.6, 0.55]
    assert [cell["p"][0] for cell in gradcam.choose(cells, 3)] == [0.99, 0.9, 0.55]
    assert len(gradcam.choose(cells, 10)) == 6


# ---------------------------------------------------------------- new images
def copy_cells(cells, paths, folder, rename=str):
    for path in paths:
        (folder / rename(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cells.root / path, folder / rename(path))


def test_a_folds_test_images_as_new_images(study, tmp_path, monkeypatch, capsys):
    """The same predictions as the run's own; scores as scikit-learn's; training images left out though renamed."""
    runs, cells = study
    own = {row["path"]: row for row in read(checkpoint(runs, 0).with_name("predictions.csv"))}
    copy_cells(cells, own, tmp_path / "new")
    used = [path for path, part in parts_of(runs, 0).items() if part != "test"]
    copy_cells(cells, used[:3], tmp_path / "new", lambda path: f"{path[:3]}/another name {used.index(path)}.jpg")
    out = tmp_path / "out"
    command(monkeypatch, "--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out", out)
    rows = {row["path"]: row for row in read(out / "predictions.csv")}
    assert set(own) < set(rows) and len(rows) == len(own) + 3
    for path, row in own.items():
        assert rows[path]["prediction"] == row["prediction"]
        for label in cells.classes:
            assert float(rows[path][f"p_{label}"]) == pytest.approx(float(row[f"p_{label}"]), abs=1e-5)
        assert float(rows[path]["confidence"]) == max(float(rows[path][f"p_{label}"]) for label in cells.classes)
        assert (out / "heatmaps" / f"{path}.png").exists()
    left_out = [row["path"] for row in read(out / "left_out.csv")]
    said = capsys.readouterr().out
    assert len(left_out) == 3 and all("another name" in path and f"{path}: not scored" in said for path in left_out)
    truth, predicted = [row["label"] for row in own.values()], [row["prediction"] for row in own.values()]
    report = sklearn.metrics.classification_report(truth, predicted, output_dict=True, zero_division=0)
    for row in read(out / "table5.csv"):
        expected = report[row["class"]]
        assert [float(row[key]) for key in ("precision", "recall", "f1", "images")] == pytest.approx(
            [expected[key] for key in ("precision", "recall", "f1-score", "support")])
    assert float(read(out / "table4.csv")[0]["accuracy"]) == pytest.approx(report["accuracy"])
    confusion = read(out / "confusion.csv")
    assert sum(int(row[label]) for row in confusion for label in cells.classes) == len(own)
    assert sum(int(row[row["true class"]]) for row in confusion) == sum(map(str.__eq__, truth, predicted))


def test_training_images_are_known_by_name_where_their_data_is_gone(study, tmp_path, monkeypatch, capsys):
    runs, cells = study
    shutil.copytree(runs, tmp_path / "runs")
    config = checkpoint(tmp_path / "runs", 1).with_name("config.json")
    config.write_text(config.read_text().replace(str(cells.root), "/moved/away"))
    example = {part: path for path, part in parts_of(runs, 1).items()}  # one of each part
    copy_cells(cells, example.values(), tmp_path / "new" / "clinic")
    options = ("--images", tmp_path / "new", "--out", tmp_path / "out", "--no-heatmaps")
    command(monkeypatch, "--checkpoint", checkpoint(tmp_path / "runs", 1), *options)
    left_out = {row["path"].removeprefix("clinic/") for row in read(tmp_path / "out" / "left_out.csv")}
    assert left_out == {example["train"], example["val"]}
    command(monkeypatch, "--checkpoint", checkpoint(runs, 0), checkpoint(runs, 1), *options)  # both folds saw them all
    assert "trained on all these images" in capsys.readouterr().out
    shutil.copy(checkpoint(runs, 1), tmp_path / "lost.pt")
    command(monkeypatch, "--checkpoint", tmp_path / "lost.pt", *options)
    assert "lost.pt: what it was trained on is not known" in capsys.readouterr().out


def test_several_checkpoints_are_averaged_and_smears_counted(study, tmp_path, monkeypatch):
    runs, cells = study
    paths = [str(path) for path in cells.paths[::9]]
    for path in paths:
        copy_cells(cells, [path], tmp_path / "new", lambda p: f"smear {len(p) % 2}, ä/{p.replace('/', '#')}")
    options = ("--images", tmp_path / "new", "--no-heatmaps", "--out")
    single = []
    for fold in (0, 1):
        command(monkeypatch, "--checkpoint", checkpoint(runs, fold), *options, tmp_path / f"out{fold}")
        single.append(read(tmp_path / f"out{fold}" / "predictions.csv"))
    command(monkeypatch, "--checkpoint", checkpoint(runs, 0), checkpoint(runs, 1), *options, tmp_path / "out")
    both = read(tmp_path / "out" / "predictions.csv")
    for first, second, mean in zip(*single, both):
        for label in cells.classes:
            key = f"p_{label}"
            assert float(mean[key]) == pytest.approx((float(first[key]) + float(second[key])) / 2, abs=1e-6)
    assert not (tmp_path / "out" / "heatmaps").exists() and not (tmp_path / "out" / "table4.csv").exists()
    counted = read(tmp_path / "out" / "differential.csv")
    smears = {row["path"].rpartition("/")[0] for row in both}
    assert {row["smear"] for row in counted} == smears and len(counted) == len(smears) * len(cells.classes)
    for row in counted:
        of_smear = [r["prediction"] for r in both if r["path"].rpartition("/")[0] == row["smear"]]
        number, total = of_smear.count(row["class"]), len(of_smear)
        interval = scipy.stats.binomtest(number, total).proportion_ci(0.95, method="wilson")
        assert (int(row["cells"]), int(row["of"])) == (number, total)
        assert [float(row[key]) for key in ("percent", "low", "high")] == pytest.approx(
            [100 * number / total, 100 * interval.low, 100 * interval.high], abs=0.006)


def test_any_image_is_judged_and_unreadable_ones_are_named(study, tmp_path, monkeypatch, capsys):
    runs, cells = study
    folder = tmp_path / "new" / "sub" / "deeper"
    folder.mkdir(parents=True)
    image = cells[0]
    content = (cells.root / cells.paths[0]).read_bytes()
    cv2.imwrite(str(folder / "grey.PNG"), image[..., 0])
    cv2.imwrite(str(folder / "deep.tif"), image.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "alpha.png"), np.dstack([image, image[..., 0]]))
    cv2.imwrite(str(folder / "wide, $5 #1.bmp"), np.tile(image[:3], (1, 3, 1)))
    (folder / "half.jpg").write_bytes(content[:len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "notes.jpeg").write_text("no image")
    command(monkeypatch, "--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out", tmp_path / "out")
    rows = read(tmp_path / "out" / "predictions.csv")
    assert [row["path"].split("/")[-1] for row in rows] == ["alpha.png", "deep.tif", "grey.PNG", "wide, $5 #1.bmp"]
    assert sorted(row["path"].split("/")[-1] for row in read(tmp_path / "out" / "left_out.csv")) == [
        "empty.jpg", "half.jpg", "notes.jpeg"]
    said = capsys.readouterr().out
    assert all(f"sub/deeper/{name}: unreadable" in said for name in ("half.jpg", "empty.jpg", "notes.jpeg"))
    for row in rows:
        shown = cv2.imread(str(tmp_path / "out" / "heatmaps" / f"{row['path']}.png"))
        original = cv2.imread(str(tmp_path / "new" / row["path"]))
        scale = gradcam.PICTURE / max(original.shape)
        assert shown.shape[:2] == (max(1, round(original.shape[0] * scale)), 2 * round(original.shape[1] * scale))
    assert len(list((tmp_path / "out" / "heatmaps").rglob("*.png"))) == 4


def test_a_map_of_folder_names(study, tmp_path, monkeypatch, capsys):
    runs, cells = study
    own = [row for row in read(checkpoint(runs, 0).with_name("predictions.csv")) if row["label"] in ("NGS", "LYT")]
    theirs = {"NGS": "Segmented neutrophil", "LYT": "Lymphocyte"}
    for row in own:
        copy_cells(cells, [row["path"]], tmp_path / "new", lambda p: f"{theirs[row['label']]}/{p.split('/')[-1]}")
    copy_cells(cells, [own[0]["path"]], tmp_path / "new", lambda p: "Unknown cell/1.jpg")
    options = ("--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out", tmp_path / "out",
               "--no-heatmaps")
    command(monkeypatch, *options)
    assert "no folder is named as a class" in capsys.readouterr().out and not (tmp_path / "out" / "table5.csv").exists()
    table = tmp_path / "map.csv"
    table.write_text("Segmented neutrophil,NGS\nLymphocyte,LYT\nUnknown cell,\n")
    command(monkeypatch, *options, "--map", table)
    assert {row["class"]: int(row["images"]) for row in read(tmp_path / "out" / "table5.csv")} == {
        label: sum(row["label"] == label for row in own) for label in theirs}
    table.write_text("Segmented neutrophil,NEUTRO\n")
    assert "NEUTRO is no class" in refusal(monkeypatch, *options, "--map", table)
    assert "can't be read" in refusal(monkeypatch, *options, "--map", tmp_path / "none.csv")


# ---------------------------------------------------------------- the prior
def test_prior_by_hand_and_by_bayes():
    ratio = gradcam.prior_ratio("train", ["a", "b"], [90, 10])
    p = gradcam.correct(np.array([[0.6, 0.4], [0.2, 0.8]]), ratio)
    np.testing.assert_allclose(p, [[0.54 / 0.58, 0.04 / 0.58], [0.18 / 0.26, 0.08 / 0.26]])
    rng = np.random.default_rng(0)
    frequencies = np.array([0.9, 0.09, 0.01])  # of three classes of cells, with one feature of known densities
    truth = rng.choice(3, 20000, p=frequencies)
    densities = scipy.stats.norm.pdf(rng.normal(truth * 1.5)[:, None], [0, 1.5, 3])
    uniform = densities / densities.sum(1, keepdims=True)  # what a network learns from balanced classes
    bayes = densities * frequencies / (densities * frequencies).sum(1, keepdims=True)
    corrected = gradcam.correct(uniform, gradcam.prior_ratio("train", list("abc"), [9000, 900, 100]))
    np.testing.assert_allclose(corrected, bayes)
    precision = [sklearn.metrics.precision_score(truth, p.argmax(1), average=None)[2] for p in (uniform, corrected)]
    assert precision[1] > 2 * precision[0]  # a rare class's precision is what the wrong prior costs
    assert np.array_equal(gradcam.prior_ratio("uniform", list("abc"), [5, 6, 0]), np.ones(3))


def test_prior_of_a_file(tmp_path, monkeypatch, study):
    file = tmp_path / "prior.csv"
    file.write_text("class,frequency\nb,30\na,70\n")
    np.testing.assert_allclose(gradcam.prior_ratio(str(file), ["a", "b"], [10, 10]), [1.4, 0.6])
    options = ("--checkpoint", checkpoint(study[0], 0), "--images", study[1].root, "--out", tmp_path / "out", "--prior")
    assert "for each of" in refusal(monkeypatch, *options, file)  # not the classes of the checkpoint
    assert "can't be read" in refusal(monkeypatch, *options, "natural")
    for bad in ("a,-1\nb,2\n", "a,x\nb,1\n", "a,0\nb,0\n", "a,nan\nb,1\n"):
        file.write_text(bad)
        with pytest.raises(SystemExit, match="frequency"):
            gradcam.prior_ratio(str(file), ["a", "b"], [1, 1])
    assert not (tmp_path / "out").exists()


def test_prior_beside_the_tables_of_a_run(study, monkeypatch, capsys):
    runs, cells = study
    command(monkeypatch, "--model", "shufflenet_v2_x0_5", "--init", "random", "--runs", runs, "--prior", "train")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    recalls = []
    for fold in (0, 1):
        rows = read(checkpoint(runs, fold).with_name("predictions.csv"))
        recalls.append(sklearn.metrics.recall_score([row["label"] for row in rows], [row["prediction"] for row in rows],
                                                    average=None, labels=cells.classes, zero_division=0))
    for label, recall in zip(cells.classes, np.mean(recalls, 0)):
        assert f"{recall:.3f}" == next(line for line in lines if line[:2] == ["uniform", label])[4]
        assert any(line[:2] == ["train", label] for line in lines)
    assert f"{np.mean(recalls):.3f}" == next(line for line in lines if line[:2] == ["uniform", str(len(cells))])[3]


# ---------------------------------------------------------------- bad input
def test_bad_input_is_one_line(study, tmp_path, monkeypatch, capsys):
    runs, cells = study
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_text("no image")
    options, good = ("--images", cells.root, "--out", out), ("--checkpoint", checkpoint(runs, 0), "--out", out)
    assert "no image found" in refusal(monkeypatch, *good, "--images", tmp_path / "empty")
    assert "no image found" in refusal(monkeypatch, *good, "--images", tmp_path / "no")
    assert "none of 1 images" in refusal(monkeypatch, *good, "--images", tmp_path / "bad")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "lightning.ckpt")
    assert "no checkpoint of ours" in refusal(monkeypatch, "--checkpoint", tmp_path / "lightning.ckpt", *options)
    assert "No such file" in refusal(monkeypatch, "--checkpoint", tmp_path / "none.pt", *options)
    content = models.read_checkpoint(checkpoint(runs, 1))
    torch.save(content | {"classes": content["classes"][::-1]}, tmp_path / "other.pt")
    message = refusal(monkeypatch, "--checkpoint", checkpoint(runs, 0), tmp_path / "other.pt", *options)
    assert "other.pt: another classes" in message
    assert not out.exists()
    for args in ((), ("--model", "resnet18"), ("--model", "resnet18", "--init", "random"), ("--checkpoint", "best.pt"),
                 ("--checkpoint", checkpoint(runs, 0), *options, "--batch-size", 0)):
        monkeypatch.setattr(sys, "argv", ["gradcam.py", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            gradcam.main()
        assert caught.value.code == 2


def test_pictures_that_an_earlier_call_wrote_among_the_images_are_no_images(study, tmp_path, monkeypatch, capsys):
    runs, cells = study
    copy_cells(cells, cells.paths[:3], tmp_path / "new")
    for _ in range(2):
        command(monkeypatch, "--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out", tmp_path / "new/out")
        assert [row["path"] for row in read(tmp_path / "new/out/predictions.csv")] == sorted(cells.paths[:3])
    with pytest.raises(SystemExit, match="the images' own folder"):
        command(monkeypatch, "--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out", tmp_path / "new/../new")


@pytest.mark.long
def test_through_the_command_line(study, tmp_path, run):
    runs, cells = study
    copy_cells(cells, cells.paths[:3], tmp_path / "new")
    done = run("gradcam.py", "--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out", "out",
               "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and "3 images" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert {"differential.csv", "predictions.csv", "heatmaps"} <= {path.name for path in (tmp_path / "out").iterdir()}
