"""Networks of timm, where it is installed: weights in DINOv2's layout, training, kills, heatmaps.

No weights can be fetched here: a file in the layout of DinoBloom's is made from a network of random weights,
whose tensors must all arrive.
"""

import numpy as np
import pytest
import torch
from conftest import call, read_log, read_rows
from test_faults import DIE_AFTER, assert_same, fold_of, prepare, starter, undisturbed  # noqa: F401 (fixtures)

import gradcam
import models
import predict

timm = pytest.importorskip("timm")
VIT, SIDE, WIDTH = "vit_small_patch14_dinov2", 16, 384  # 224 / 14 patches a side, as DinoBloom was trained


@pytest.fixture(scope="module")
def backbone():
    """Random weights of DINOv2's ViT-S/14 at 224 pixels: {name: tensor}, without a head."""
    torch.manual_seed(0)
    state = timm.create_model(VIT, img_size=224, num_classes=0).state_dict()
    for value in state.values():  # none may equal another network's first weights
        value.normal_()
    return state


def save_teacher(file, backbone, **changes):
    """As DINOv2's training saves a teacher: backbone's and heads' tensors; changes: None leaves one out."""
    state = backbone | {"mask_token": torch.zeros(1, WIDTH)} | changes
    state = {f"backbone.{key}": value for key, value in state.items() if value is not None}
    state |= {
        "dino_head.mlp.0.weight": torch.zeros(8, WIDTH),
        "ibot_head.last_layer.weight": torch.zeros(8, 8),
    }
    torch.save({"teacher": state}, file)
    return str(file)


def test_a_foundation_models_tensors_all_arrive(backbone, tmp_path):
    file = save_teacher(tmp_path / "DinoBloom-S.pth", backbone)
    state = models.build_model(VIT, 21, file, 224).state_dict()
    assert (
        state.keys() - backbone.keys() == {"head.weight", "head.bias"} and not backbone.keys() - state.keys()
    )
    assert all(torch.equal(state[key], value) for key, value in backbone.items())
    smaller = models.build_model(VIT, 21, file, 56).state_dict()
    assert smaller["pos_embed"].shape == (1, 4 * 4, WIDTH) or smaller["pos_embed"].shape == (
        1,
        1 + 4 * 4,
        WIDTH,
    )
    others = backbone.keys() - {"pos_embed"}
    assert all(torch.equal(smaller[key], backbone[key]) for key in others)


def test_position_embeddings_are_interpolated_over_the_grid(backbone, tmp_path):
    """Embeddings that grow with row and column grow so on the smaller grid, at the patches' own places."""
    plane = torch.arange(SIDE).float()
    rows = torch.zeros(1, 1 + SIDE**2, WIDTH)
    rows[0, 1:, 0] = plane.repeat_interleave(SIDE)
    rows[0, 1:, 1] = plane.repeat(SIDE)
    file = save_teacher(tmp_path / "plane.pth", backbone, pos_embed=rows)
    grid = models.build_model(VIT, 3, file, 112).state_dict()["pos_embed"][0, 1:].reshape(8, 8, WIDTH)
    middles = 2 * torch.arange(8) + 0.5  # of two patches each
    inner = slice(1, -1)
    assert torch.allclose(grid[inner, inner, 0], middles[inner, None].expand(6, 6), atol=0.1)
    assert torch.allclose(grid[inner, inner, 1], middles[None, inner].expand(6, 6), atol=0.1)


@pytest.mark.parametrize("lost", ["blocks.11.mlp.fc2.bias", "cls_token", "pos_embed", "norm.weight"])
def test_nothing_is_left_random_without_a_word(backbone, tmp_path, lost):
    file = save_teacher(tmp_path / "lost.pth", backbone, **{lost: None})
    with pytest.raises(SystemExit, match=lost):
        models.build_model(VIT, 21, file, 56)
    torch.save({"teacher": {"student.x": torch.zeros(1)}}, tmp_path / "none.pth")
    with pytest.raises(SystemExit, match="not the weights of"):
        models.build_model(VIT, 21, str(tmp_path / "none.pth"), 56)


@pytest.mark.long
@pytest.mark.parametrize("model, size", [(VIT, 56), ("convnext_atto", 64)])
def test_trained_killed_explained_and_predicted(starter, undisturbed, tmp_path, model, size):  # noqa: F811
    """As torchvision's: a killed run continues to the same bits; heatmaps and predictions come from it."""
    more = f"--image-size {size} --epochs 2"
    reference = undisturbed(more, model)
    prepare(tmp_path, reference)
    starter.train(tmp_path, more, DIE_AFTER.format(name="log.csv", n=1), model)
    assert len(read_log(fold_of(tmp_path, model))) == 1
    starter.train(tmp_path, more, model=model)
    assert_same(tmp_path, reference, model)
    checkpoint, out = fold_of(tmp_path, model) / "best.pt", tmp_path / "out"
    call(predict, "--checkpoint", checkpoint, "--images", starter.cells, "--out", out, "--device", "cpu")
    ours = {row["path"]: row for row in read_rows(out / "predictions.csv")}
    for row in read_rows(fold_of(tmp_path, model) / "predictions.csv"):
        for key in (key for key in row if key.startswith("p_")):
            assert float(ours[row["path"]][key]) == pytest.approx(float(row[key]), abs=1e-3)
    net, _ = models.load_checkpoint(checkpoint)
    heat = gradcam.heatmaps(net, torch.randn(2, 3, size, size), [0, 1])
    assert heat.shape == (2, size, size) and np.ptp(heat) > 0.1
    assert len(list((out / "heatmaps").rglob("*.png"))) == 32
