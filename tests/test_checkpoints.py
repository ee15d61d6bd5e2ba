"""Checkpoints from strangers: nothing in a file is ever run, and what does not fit is named in one line."""

import os
import pickle

import pytest
import torch

import models

CLASSES = ["BAS", "FGC", "NGS"]


class Mischief:
    """An object whose loading runs a command that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def checkpoint(**changes):
    torch.manual_seed(0)
    net = models.build_model("resnet18", 3, None, 64)
    content = {"state_dict": net.state_dict(), "model": "resnet18", "classes": CLASSES, "init": "random"}
    content |= {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 64, "fold": 0, "epoch": 3}
    return content | {"val_accuracy": 0.7, "train_counts": [4, 5, 6]} | changes


def refusal(file):
    with pytest.raises(SystemExit) as caught:
        models.load_checkpoint(file)
    message = caught.value.code
    assert isinstance(message, str) and "\n" not in message and str(file) in message
    return message


def test_a_good_one_comes_back_whole(tmp_path):
    content = checkpoint()
    torch.save(content, tmp_path / "best.pt")
    net, info = models.load_checkpoint(tmp_path / "best.pt")
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, content["state_dict"][key]) for key, tensor in net.state_dict().items())
    assert info == {key: value for key, value in content.items() if key != "state_dict"}


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "best.pt"
    for save in (
        lambda content: torch.save(content, file),
        lambda content: torch.save(content, file, _use_new_zipfile_serialization=False),
        lambda content: file.write_bytes(pickle.dumps(content, protocol=2)),
    ):
        save(checkpoint(info=Mischief(mark)))
        message = refusal(file)
        assert "nothing of it was run" in message or "damaged" in message
        assert not mark.exists()
    torch.save(checkpoint(info=Mischief(mark)), file)
    assert "holds more than tensors" in refusal(file)
    torch.load(file, weights_only=False)  # the mischief is real: without weights_only it strikes
    assert mark.exists()


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(models.build_model("resnet18", 3), tmp_path / "net.pt")
    assert "holds more than tensors" in refusal(tmp_path / "net.pt")


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "best.pt"
    torch.save(checkpoint(), file)
    content = file.read_bytes()
    half = content[: len(content) // 2]
    for damaged in (b"", content[:1000], half, content[:-1000], b"not a checkpoint", bytes(range(256)) * 20):
        file.write_bytes(damaged)
        assert "damaged" in refusal(file)
    assert "No such file" in refusal(tmp_path / "nothing.pt")
    assert "directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model": "resnet34"}, 'Missing key(s) in state_dict: "layer1.2.conv1.weight"'),
        ({"model": "mobilenet_v3_small"}, "not the weights of mobilenet_v3_small"),
        ({"classes": [*CLASSES, "LYT"], "train_counts": [1, 2, 3, 4]}, "size mismatch for fc.weight"),
        ({"classes": CLASSES[:2], "train_counts": [1, 2]}, "size mismatch for fc.weight"),
        ({"classes": None}, "it lacks classes"),
        ({"state_dict": None}, "no checkpoint of ours"),
        ({"model": "resnet17"}, "resnet17"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, named):
    file = tmp_path / "best.pt"
    torch.save(checkpoint(**change), file)
    message = refusal(file)
    assert any(word in message for word in named.split("|")), message


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path):
    file, state = tmp_path / "best.pt", checkpoint()["state_dict"]
    for change, named in (
        ({"layer4.0.conv1.weight": None}, 'Missing key(s) in state_dict: "layer4.0.conv1.weight"'),
        ({"conv7.weight": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "conv7.weight"'),
        ({"conv1.weight": torch.zeros(64, 4, 7, 7)}, "size mismatch for conv1.weight"),
        ({"conv1.weight": "weights"}, '"conv1.weight", expected torch.Tensor'),
        ({7: torch.zeros(1)}, "'int'"),
    ):
        changed = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(checkpoint(state_dict=changed), file)
        assert named in refusal(file)


def test_other_programs_checkpoints_are_no_checkpoint_of_ours(tmp_path):
    for name, content in (
        ("lightning.ckpt", {"epoch": 1, "global_step": 5, "state_dict": {}}),
        ("list.pt", [1, 2]),
        ("torchvision.pth", models.build_model("resnet18", 3).state_dict()),
    ):
        torch.save(content, tmp_path / name)
        message = refusal(tmp_path / name)
        assert "no checkpoint of ours" in message or "no weights" in message
