"""A self-test of one's own GPU: python -m pytest -m cuda. Each fact is what a night of training relies on."""

import copy
import itertools
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT

import datasets
import engine
import gradcam
import learning_rate
import models
import train

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
CUDA = torch.device("cuda")
PAPER = ("vgg19_bn", "resnet152", "regnet_y_32gf", "vit_l_32")
SMALLER = ("vgg11_bn", "resnet18", "regnet_y_400mf", "vit_b_32")  # of these families: they compile in seconds
SETTINGS = {"mean": (0.56, 0.50, 0.74), "std": (0.24, 0.28, 0.18), "image_size": 64, "device": CUDA}


@pytest.fixture
def cells():
    """48 pictures in memory: red ones of class A, blue ones of class B."""
    images = np.random.default_rng(0).integers(0, 80, (48, 70, 70, 3), np.uint8)
    images[:24, ..., 0] += 100
    images[24:, ..., 2] += 100
    pictures = {str(i): image for i, image in enumerate(images)}
    targets = np.arange(48) >= 24
    return datasets.Cells(".", "mine", ["A", "B"], list(pictures), targets, read=pictures.__getitem__)


@pytest.fixture(autouse=True)
def clean():
    """Each test starts with an empty cache and leaves no debug mode."""
    torch.set_float32_matmul_precision("high")
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()


def prepared(name, amp, layout="channels_last", size=64):
    """(network on the GPU, optimizer, scaler), ready to train."""
    engine.seed_all(engine.WEIGHTS, 0, 0)
    net = models.build_model(name, 21, image_size=size).to(CUDA, memory_format=engine.LAYOUTS[layout])
    return net, engine.make_optimizer("sgd", net, 1e-3), torch.amp.GradScaler("cuda", enabled=amp == "fp16")


def batches(number, size=64, images=8):
    """Pinned batches as the loader makes them: uint8 [N,3,H,W] in channels_last."""
    draw, made = torch.Generator().manual_seed(0), []
    for _ in range(number):
        pixels = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8, generator=draw)
        labels = torch.randint(0, 21, (images,), generator=draw)
        made.append((pixels.permute(0, 3, 1, 2).pin_memory(), labels.pin_memory()))
    return made


def losses(net, optimizer, scaler, some, amp, layout="channels_last"):
    mean, std = (torch.tensor(SETTINGS[name], device=CUDA) for name in ("mean", "std"))
    return engine.train_epoch(net, some, optimizer, scaler, mean, std, CUDA, amp, engine.LAYOUTS[layout])


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_keep_channels_last(cells, workers):
    order = datasets.BalancedEpochs(cells.targets, 8)
    images, labels = next(iter(datasets.loader(datasets.Batches(cells, 64), order, workers, pin=True)))
    assert images.is_pinned() and labels.is_pinned()
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.uint8


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_no_step_waits_for_the_gpu(amp):
    """PyTorch raises at whatever makes the CPU wait, once the first steps have chosen their algorithms."""
    net, optimizer, scaler = prepared("resnet18", amp)
    losses(net, optimizer, scaler, batches(3), amp)
    some = batches(5)
    mean, std = (torch.tensor(SETTINGS[name], device=CUDA) for name in ("mean", "std"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    found = engine.train_epoch(net, some, optimizer, scaler, mean, std, CUDA, amp, torch.channels_last)
    torch.cuda.set_sync_debug_mode("default")
    assert found.shape == (5,) and torch.isfinite(found).all()


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_take_steps(name, amp):
    """Finite losses; gradients lie in memory as the weights do, by which fused optimizers pair them."""
    net, optimizer, scaler = prepared(name, amp)
    found = losses(net, optimizer, scaler, batches(3), amp)
    assert torch.isfinite(found).all()
    assert all(p.grad.stride() == p.stride() for p in net.parameters())
    assert torch.isfinite(torch.cat([p.detach().flatten() for p in net.parameters()])).all()


@pytest.mark.parametrize("name", SMALLER)
def test_compiled_losses_are_the_eager_ones(name):
    """Without breaks of the graph, and with CUDA graphs, which speed needs."""
    from torch._dynamo.utils import counters

    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        net, optimizer, scaler = prepared(name, "bf16")
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # compiled code draws other random numbers
        run = torch.compile(net, mode="reduce-overhead") if compiled else net
        found.append(losses(run, optimizer, scaler, batches(12), "bf16").cpu())
    assert torch.allclose(*found, rtol=0.05, atol=0.02), found
    assert not counters["graph_break"] and not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_killed_and_resumed_it_has_the_same_schedule(cells, tmp_path, amp):
    """A failure in epoch 3 of 5: rates are equal and losses close, since CUDA's sums have no fixed order."""

    def fitted(folder, fail=None):
        engine.seed_all(engine.WEIGHTS, 0, 0)
        net, epoch = models.build_model("resnet18", 2, image_size=64), itertools.count(1)
        if fail:

            def stop(module, inputs):
                if module.training and next(epoch) > 6 * fail:
                    raise InterruptedError

            net.register_forward_pre_hook(stop)
        options = {"lr": 0.01, "epochs": 5, "batch_size": 8, "amp": amp, "schedule": "cosine"} | SETTINGS
        return engine.fit(folder, net, cells, cells, **options)

    with pytest.raises(InterruptedError):
        fitted(tmp_path / "killed", fail=2)
    killed, whole = fitted(tmp_path / "killed"), fitted(tmp_path / "whole")
    assert [row["lr"] for row in killed] == [row["lr"] for row in whole] and len(killed) == 5
    losses = [[row["train_loss"] for row in rows] for rows in (killed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2, abs=0.05)


def test_out_of_memory_is_one_line():
    def main():
        torch.empty(1 << 50, dtype=torch.uint8, device=CUDA)

    with pytest.raises(SystemExit) as caught:
        train.run_main(main)
    line = caught.value.code
    assert "out of memory" in line and "--batch-size" in line and "\n" not in line


def test_range_test_and_trial_leave_no_memory_behind(cells, tmp_path):
    """Neither allocated nor reserved, so that other jobs of the GPU have it."""
    one = torch.ones(64, 64, device=CUDA, requires_grad=True)
    (one @ one).sum().backward()  # cuBLAS takes a workspace for each of the two threads
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    options = SETTINGS | {
        "batch_size": 8,
        "seed": 0,
        "crop": True,
        "workers": 0,
        "amp": "bf16",
        "epochs": 500,
    }
    options |= {"memory_format": "channels_last", "optimizer": "sgd"}

    def make_net(number):
        return models.build_model("resnet18", 2, image_size=64)

    learning_rate.find_lr(tmp_path, make_net, cells, cells, **options)
    assert json.loads((tmp_path / "measured.json").read_text())["candidates"]
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert after[0] <= before[0] + 2**25 and after[1] <= before[1] + 2**26  # cuBLAS keeps a workspace


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32", "vgg11_bn"])
def test_heatmaps_are_those_of_the_cpu(name):
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    net = models.build_model(name, 3, image_size=96).eval()
    images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    cpu = gradcam.heatmaps(copy.deepcopy(net), images, [0, 1, 2, 0])
    gpu = gradcam.heatmaps(net.to(CUDA), images.to(CUDA), [0, 1, 2, 0])
    torch.backends.cudnn.allow_tf32 = True
    assert np.abs(cpu - gpu).max() < 0.02


def test_logits_are_those_of_the_cpu(cells):
    net = models.build_model("resnet18", 2, image_size=64)
    cpu = engine.predict(net, cells, **SETTINGS | {"device": "cpu"})
    gpu = engine.predict(net.to(CUDA), cells, **SETTINGS)
    assert gpu.device.type == "cpu" and torch.allclose(cpu, gpu, atol=0.02)


def test_a_run_on_the_cpu_does_not_touch_cuda(run, tmp_path):
    """Where another user's jobs fill the GPU, --device cpu works all the same: no context is made."""
    code = """
import sys, numpy as np, torch, datasets, engine, train
images, targets = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 2
cells = datasets.Cells(".", "mine", ["A", "B"], list("01234567"), targets, read=lambda i: images[int(i)])
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2))
options = {"lr": 0.1, "epochs": 1, "image_size": 32, "mean": [0] * 3, "std": [1] * 3}
engine.fit(sys.argv[1], net, cells, cells, device=train.choose_device("cpu"), **options)
sys.exit(torch.cuda.is_initialized())
"""
    (tmp_path / "code.py").write_text(code)
    done = run(tmp_path / "code.py", tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU alone")
def test_a_second_gpu_is_used_alone(cells, tmp_path):
    """--device cuda:1: the first GPU's memory stays as it is."""
    before = torch.cuda.memory_allocated(0)
    device = train.choose_device("cuda:1")
    try:
        net = models.build_model("resnet18", 2, image_size=64)
        options = SETTINGS | {"device": device, "lr": 0.01, "epochs": 1, "batch_size": 8, "amp": "bf16"}
        engine.fit(tmp_path, net, cells, cells, **options)
    finally:
        torch.cuda.set_device(0)
    assert torch.cuda.memory_allocated(0) == before and torch.cuda.max_memory_allocated(1) > 0
