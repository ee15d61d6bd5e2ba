"""The chain of initialisations: training starts, tensor for tensor, as it should; only the head is new.

The files are real ones: a state_dict in torchvision's layout under torchvision's own file name in a temporary
TORCH_HOME, and best.pt files as pre-training leaves them.
"""

import csv
import hashlib
import json
import re

import pytest
import torch
import torchvision

import models

HEADS = {"resnet18": "fc", "regnet_y_400mf": "fc", "mobilenet_v3_small": "classifier.3"}
HEADS |= {"vgg11_bn": "classifier.6", "vit_b_32": "heads.head"}
LARGE = ("vgg11_bn", "vit_b_32")  # files of 350 MB and more


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def put_imagenet_file(name, weights="imagenet", **options):
    """Save random weights of 1,000 classes as torchvision's own file; returns the state_dict."""
    file = models.imagenet_file(name, weights)[1]
    state = torchvision.models.get_model(name, **options).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return state


def save_checkpoint(file, net, name, classes, **changes):
    content = {
        "state_dict": net.state_dict(),
        "model": name,
        "classes": classes,
        "init": "cd",
        "image_size": 64,
    }
    content |= {"mean": [0.5] * 3, "std": [0.2] * 3, "fold": 0, "epoch": 1, "val_accuracy": 0.5}
    content |= {"train_counts": [3] * len(classes)} | changes
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def differing(net, state):
    """Names of tensors that are not bit for bit those of state."""
    own = net.state_dict()
    common = own.keys() & state.keys()
    return own.keys() ^ state.keys() | {key for key in common if not torch.equal(own[key], state[key])}


def long_if(name, *values, large=LARGE):
    """A parameter of a test that takes long for large networks."""
    return pytest.param(name, *values, marks=pytest.mark.long if name in large else ())


@pytest.mark.parametrize("name", [long_if(name) for name in HEADS])
def test_imagenet_is_torchvisions_file_but_for_the_head(name, torch_home):
    options = {"image_size": 64} if name.startswith("vit") else {}
    state = put_imagenet_file(name, **options)
    net = models.build_model(name, 21, "imagenet", 64)
    assert differing(net, state) == {HEADS[name] + ".weight", HEADS[name] + ".bias"}
    assert net.get_submodule(HEADS[name]).out_features == 21
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())


OLDER = {"resnet18": 64, "densenet121": 64, "mnasnet0_5": 64, "googlenet": 64}
OLDER |= {"vgg19_bn": 224, "vit_b_32": 224, "vit_l_32": 224}


@pytest.mark.parametrize("name, size", [long_if(*item, large=list(OLDER)[4:]) for item in OLDER.items()])
def test_files_of_older_versions_are_read_as_torchvision_reads_them(name, size, torch_home):
    """Batch norm of 2017 counts no batches, ViT's MLPs have layers linear_1 and linear_2 (vision 6053),
    DenseNet's have norm.1 and conv.1, GoogLeNet has side outputs, MNASNet needs its version."""
    state = put_imagenet_file(name)
    if name not in ("mnasnet0_5", "googlenet"):
        older = [(r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2.")]
        for new, old in [*older, (r"(denselayer\d+\.(norm|conv))(\d)", r"\1.\3")]:
            state = {re.sub(new, old, key): value for key, value in state.items()}
        state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
        torch.save(state, models.imagenet_file(name)[1])
        assert state.keys() != torchvision.models.get_model(name).state_dict().keys()
    theirs = torchvision.models.get_model(name, weights=models.find_weights(name))
    net = models.build_model(name, 21, "imagenet", size)
    head = models.head_name(net)
    assert differing(net, theirs.state_dict()) == {f"{head}.weight", f"{head}.bias"}
    file = save_checkpoint(torch_home / "best.pt", net, name, list("abcdefghijklmnopqrstu"), image_size=size)
    loaded, _ = models.load_checkpoint(file)
    assert not differing(loaded, net.state_dict())


@pytest.mark.parametrize("name", sorted(set(HEADS) - set(LARGE)))
def test_in_domain_pretraining_hands_on_all_but_the_head(name, tmp_path):
    source = models.build_model(name, 11, None, 64)
    file = save_checkpoint(tmp_path / "best.pt", source, name, list("abcdefghijk"))
    net = models.build_model(name, 11, str(file), 64)  # as many classes, and the head is new all the same
    assert differing(net, source.state_dict()) == {HEADS[name] + ".weight", HEADS[name] + ".bias"}


LAYOUTS = {
    "torchvision's": lambda state: state,
    "of PyTorch's ImageNet example": lambda state: {
        "arch": "resnet18",
        "best_acc1": torch.tensor(0.5),
        "optimizer": {"param_groups": [{"lr": 0.1}]},
        "state_dict": {f"module.{key}": value for key, value in state.items()},
    },
    "of torchvision's own scripts": lambda state: {"model": state, "epoch": 3},
    "compiled": lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("wrap", LAYOUTS.values(), ids=LAYOUTS)
def test_a_state_dict_of_another_program_is_taken_but_for_its_head(wrap, tmp_path):
    source = torchvision.models.resnet18(num_classes=7)
    torch.save(wrap(source.state_dict()), tmp_path / "theirs.pth")
    net = models.build_model("resnet18", 21, str(tmp_path / "theirs.pth"), 64)
    assert differing(net, source.state_dict()) == {"fc.weight", "fc.bias"} and net.fc.out_features == 21


def test_a_state_dict_of_another_network_is_refused(tmp_path):
    file = tmp_path / "theirs.pth"
    for name, missing in (("mobilenet_v3_small", "conv1.weight"), ("resnet34", "layer1.2.conv1.weight")):
        torch.save(torchvision.models.get_model(name).state_dict(), file)
        message = refusal("resnet18", 21, str(file))
        assert "not the weights of resnet18" in message and str(file) in message and missing in message
    torch.save({"epoch": 3, "weights": [1.0]}, file)
    assert "not the weights of resnet18" in refusal("resnet18", 21, str(file))


def test_the_whole_chain_imagenet_then_cd(torch_home):
    state = put_imagenet_file("resnet18")
    pretrained = models.build_model("resnet18", 11, "imagenet", 64)
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.mul_(1.5)  # what pre-training does: everything changes
    file = save_checkpoint(torch_home / "best.pt", pretrained, "resnet18", list("abcdefghijk"))
    net = models.build_model("resnet18", 21, file, 64)
    assert differing(net, pretrained.state_dict()) == {"fc.weight", "fc.bias"}
    assert torch.equal(net.conv1.weight, state["conv1.weight"] * 1.5)


def test_seed_decides_random_weights_and_head(torch_home):
    put_imagenet_file("resnet18")
    nets = []
    for seed, weights in ((1, None), (1, None), (2, None), (1, "imagenet")):
        torch.manual_seed(seed)
        nets.append(models.build_model("resnet18", 5, weights))
    assert not differing(nets[0], nets[1].state_dict())
    assert {"conv1.weight", "fc.weight"} <= differing(nets[0], nets[2].state_dict())
    assert torch.equal(nets[0].fc.weight, nets[3].fc.weight)  # strategies are compared from the same head
    bound = (
        nets[0].fc.in_features ** -0.5
    )  # nn.Linear: within 1/sqrt(inputs), not torchvision's zeros or 0.01
    assert 0.95 * bound < nets[0].fc.weight.abs().max() <= bound


def test_random_weights_are_torchvisions_own(torch_home):
    torch.manual_seed(3)
    net = models.build_model("regnet_y_400mf", 7)
    torch.manual_seed(3)
    assert differing(net, torchvision.models.regnet_y_400mf().state_dict()) == {"fc.weight", "fc.bias"}


def test_position_embeddings_are_interpolated():
    state = torchvision.models.vit_b_32().state_dict()  # made at 224 pixels: a grid of 7 x 7
    net = models.build_model("vit_b_32", 21, None, 64)
    models.load_state(net, dict(state), "a file", "vit_b_32")
    position = "encoder.pos_embedding"
    assert differing(net, state) == {position, "heads.head.weight", "heads.head.bias"}
    ours, theirs = net.state_dict()[position], state[position]
    assert ours.shape == (1, 1 + 2 * 2, 768) and torch.equal(
        ours[:, 0], theirs[:, 0]
    )  # the class token's own
    grid = theirs[0, 1:].reshape(7, 7, 768)[::6, ::6]  # the corners of the old grid, by hand
    torch.testing.assert_close(ours[0, 1:].reshape(2, 2, 768), grid)
    larger = models.build_model("vit_b_32", 2, None, 96)
    models.load_state(larger, net.state_dict(), "a file", "vit_b_32")
    assert larger.state_dict()[position].shape == (1, 10, 768)
    assert larger(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


def test_weights_of_table_3_unless_told_otherwise(torch_home):
    enums = {
        "vgg19_bn": "VGG19_BN_Weights.IMAGENET1K_V1",
        "resnet152": "ResNet152_Weights.IMAGENET1K_V2",
        "regnet_y_32gf": "RegNet_Y_32GF_Weights.IMAGENET1K_V2",
        "vit_l_32": "ViT_L_32_Weights.IMAGENET1K_V1",
    }
    for name, enum in enums.items():
        url, file = models.imagenet_file(name)
        assert url == torchvision.models.get_weight(enum).url
        assert file == torch_home / "hub" / "checkpoints" / url.split("/")[-1]
    for spelling in ("IMAGENET1K_V1", "imagenet1k_v1"):
        v1 = torchvision.models.ResNet152_Weights.IMAGENET1K_V1.url
        assert models.imagenet_file("resnet152", spelling)[0] == v1
    default = torchvision.models.ResNet50_Weights.DEFAULT.url
    assert models.imagenet_file("resnet50")[0] == default
    state = put_imagenet_file("resnet18", "IMAGENET1K_V1")
    assert differing(models.build_model("resnet18", 3, "IMAGENET1K_V1"), state) == {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):  # says which there are
        models.build_model("resnet18", 3, "IMAGENET1K_V7")


def refusal(*args):
    with pytest.raises(SystemExit) as caught:
        models.build_model(*args)
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code  # status 1 and one line
    return caught.value.code


def test_truncated_and_foreign_imagenet_files_are_refused(torch_home):
    put_imagenet_file("resnet18")
    url, file = models.imagenet_file("resnet18")
    content = file.read_bytes()
    old = torch_home / "old.pth"  # the layout of files of before 2020, e.g. torchvision's VGGs
    torch.save(torchvision.models.resnet18().state_dict(), old, _use_new_zipfile_serialization=False)
    half = len(content) // 2
    parts = (b"", content[:10], content[:half], content[:-100], old.read_bytes()[:-100])
    for damaged in (*parts, b"<html>login</html>"):
        file.write_bytes(damaged)
        message = refusal("resnet18", 21, "imagenet")
        assert url in message and str(file) in message and "damaged" in message
    torch.save(torchvision.models.resnet34().state_dict(), file)
    message = refusal("resnet18", 21, "imagenet")
    assert url in message and "not the weights of resnet18" in message and "layer1.2" in message
    assert len(message) < 700
    state = torchvision.models.resnet18().state_dict()
    torch.save(state | {"layer1.0.conv1.weight": state["layer1.0.conv1.weight"][:32]}, file)
    message = refusal("resnet18", 21, "imagenet")
    assert "layer1.0.conv1.weight" in message and "[32, 64, 3, 3]" in message and "[64, 64, 3, 3]" in message
    file.write_bytes(old.read_bytes())
    models.build_model("resnet18", 21, "imagenet")  # whole, that old layout is read


def test_no_network_names_url_and_place(torch_home, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the way out is closed
    monkeypatch.setenv("no_proxy", "")
    message = refusal("resnet18", 21, "imagenet", 64)
    url, file = models.imagenet_file("resnet18")
    assert url in message and str(file) in message
    assert not list(torch_home.rglob("*.pth"))  # nothing that looks like weights is left


def test_weights_are_fetched_before_the_night(torch_home, monkeypatch, capsys):
    """python models.py --fetch: what is there is not fetched again; the first failure ends it, status 1."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    put_imagenet_file("squeezenet1_1")
    (url, file), there = models.imagenet_file("resnet18"), models.imagenet_file("squeezenet1_1")[1]
    for names, status, out in (
        (["squeezenet1_1"], None, f"{there}\n"),
        (["squeezenet1_1", "resnet18"], url, f"{there}\n"),
        (["squeezenet1_1", "resnet_18"], 2, ""),
    ):
        monkeypatch.setattr("sys.argv", ["models.py", "--fetch", *names])
        try:
            code = models.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        assert captured.out == out and (code == status or code.startswith(f"{status}: cannot be fetched"))
    assert "do you mean resnet18" in captured.err and not file.exists()


def test_weights_of_another_kind_are_never_random_instead(tmp_path):
    assert "no such file" in refusal("resnet18", 21, str(tmp_path / "best.pt")).lower()
    small = models.build_model("mobilenet_v3_small", 3)
    file = save_checkpoint(tmp_path / "best.pt", small, "mobilenet_v3_small", list("abc"))
    assert "not the weights of resnet18" in refusal("resnet18", 21, file)


@pytest.mark.long
def test_unfinished_pretraining_is_not_used(tmp_path, run, demo):
    folder = tmp_path / "pretrain" / "resnet18" / "cd"
    save_checkpoint(folder / "best.pt", models.build_model("resnet18", 11), "resnet18", list("abcdefghijk"))
    options = "--model resnet18 --init cd --fold 0 --epochs 1 --image-size 32".split()
    done = run("train.py", *options, "--data", demo / "bm", "--runs", tmp_path)
    assert done.returncode == 1 and "pretrain.py --model resnet18 --init cd" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("train/*/*/fold0/*.csv"))


@pytest.mark.long
def test_chain_through_the_command_line(tmp_path, run, demo, monkeypatch):
    """ImageNet's file, pretrain.py and train.py imagenet+cd; at a rate of 1e-60 weights stay as they are."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = put_imagenet_file("resnet18")
    options = "--model resnet18 --init imagenet+cd --epochs 1 --image-size 32 --lr 1e-60 --workers 0"
    options = [*options.split(), "--device", "cpu", "--runs", tmp_path / "runs"]
    for script, data, more in (("pretrain.py", "cd", ()), ("train.py", "bm", ("--fold", 0))):
        done = run(script, *options, "--data", demo / data, *more)
        assert done.returncode == 0, done.stderr
    best = tmp_path / "runs/pretrain/resnet18/imagenet+cd/best.pt"
    fold = tmp_path / "runs/train/resnet18/imagenet+cd/fold0"
    pretrained, tuned = (models.read_checkpoint(file) for file in (best, fold / "best.pt"))
    moving = {key for key in state if "running_" in key or "num_batches" in key}  # they move at any rate
    head = {"fc.weight", "fc.bias"}
    for first, second in ((state, pretrained["state_dict"]), (pretrained["state_dict"], tuned["state_dict"])):
        assert {key for key in state if not torch.equal(first[key], second[key])} - moving == head
    assert len(pretrained["classes"]) == 11 and len(tuned["classes"]) == 21
    config = json.loads((fold / "config.json").read_text())
    assert config["weights"] == hashlib.sha256(best.read_bytes()).hexdigest()
    with open(fold / "predictions.csv", newline="") as handle:
        assert {f"p_{label}" for label in tuned["classes"]} <= set(next(csv.reader(handle)))
