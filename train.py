"""Fine-tune a network on bone marrow cells, or on any folder of class folders, by the paper's protocol.

    python train.py --model vit_l_32 --init imagenet     # all folds of data/bm; resumes where it stopped
    python train.py --model resnet18 --init random --fold 0 --data data/mine --epochs 25 --image-size 96
    torchrun --standalone --nproc_per_node=4 train.py --model resnet152 --init imagenet+cd    # on four GPUs

Writes runs/train/<model>/<name>/fold<k>/ (<name>: --name, or the init). Kill it at any time: the same command
resumes after the last complete epoch, on a CPU bit for bit. Exit status: 0 done, 1 bad data or failed
training, 2 bad arguments, 75 another process is working on the run, 128 + n stopped by signal n.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import datetime
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback

import numpy as np
import torch
import torch.distributed as dist
import torch_lr_finder
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import datasets
import models
import splits

# hyperparameters (paper, section 2.2)
MOMENTUM = 0.9  # SGD without weight decay
PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.1, 3
RANGE_LOW, RANGE_HIGH, RANGE_STEPS, RANGE_SMOOTHING = 1e-7, 10, 100, 0.05

# what --optimizer and --schedule take; of an optimizer, the middle one of the rates that --lr auto tries
OPTIMIZERS, SCHEDULES = {"sgd": 3e-3, "adamw": 3e-4}, ("plateau", "cosine")
TRIAL_SHARES = (1 / 10, 1 / 3, 1, 10 / 3, 10)  # the rates tried, as shares of that one
TRIAL_MIN_STEPS, TRIAL_MAX_STEPS, TRIAL_VAL_IMAGES = 20, 300, 2000

EVAL_BATCH_SIZE = 64
BUSY = 75  # exit status EX_TEMPFAIL
WEIGHTS, DROPOUT, TRIAL = 3, 4, 5  # begin the keys of random streams; datasets.py has 1 and 2
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "can't allocate memory",
    "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
DEAD_WORKER = ("DataLoader worker (pid", "DataLoader timed out")


# ---------------------------------------------------------------- setup
def choose_device(device="auto"):
    """torch.device of auto (CUDA, or else the CPU), cpu, cuda, cuda:1, ...; ValueError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # the user wants the CPU
        smi = not hidden and device == "cpu" and shutil.which("nvidia-smi")
        if smi and b"GPU 0" in subprocess.run([smi, "-L"], capture_output=True).stdout:
            try:
                torch.cuda.init()
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    "nvidia-smi lists a GPU, but CUDA cannot start "
                    f"({str(error).splitlines()[0]}); install a PyTorch wheel that fits the "
                    "driver, or use --device cpu"
                ) from None
        if device == "cpu":
            print("no CUDA device: training on the CPU", file=sys.stderr)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: not one of auto, cpu, cuda, cuda:1, ...")
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: no such CUDA device found; use another or --device cpu")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def choose_amp(device, amp="auto"):
    """bf16 where the hardware has it (CUDA: from Ampere on), fp16 on Volta and Turing, else off."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)[0]
        return "bf16" if capability >= 8 else "fp16" if capability == 7 else "off"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return "bf16" if cpuinfo.exists() and re.search("avx512_bf16|amx_bf16", cpuinfo.read_text()) else "off"


def choose_workers(workers, device, batch_size, image_size):
    """Data loading processes; auto: the cores, shared by run_all.sh's jobs (JOBS) and torchrun's ranks.

    SystemExit if /dev/shm has no room for the batches that they hold ready, two each.
    """
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
    share = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    cores //= share * int(os.environ.get("JOBS") or 1)
    default = max(1, min(16, cores - 1)) if device.type == "cuda" else min(1, cores // 2)
    workers = default if workers == "auto" else int(workers)
    need = 2 * workers * share * max(batch_size, EVAL_BATCH_SIZE) * 3 * image_size**2 / 2**20
    free = shutil.disk_usage("/dev/shm").free / 2**20 if os.path.isdir("/dev/shm") else need
    if free < need:
        raise SystemExit(
            f"/dev/shm has {free:.0f} MB free, {workers} data workers need {need:.0f} MB: start "
            "the container with a larger --shm-size, or use fewer --workers (0 needs none)"
        )
    return workers


def seed_all(*key):
    """Seed torch's global generators with a key such as (DROPOUT, seed, fold, epoch, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


# ---------------------------------------------------------------- torchrun: one run by several ranks
def ranks():
    """(rank, number of ranks) of this process: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(device):
    """Under torchrun join the other ranks (NCCL on CUDA, gloo on a CPU); returns this rank's device.

    ValueError if it has no GPU of its own.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ):
        return device
    options = {"backend": "gloo", "timeout": datetime.timedelta(days=7)}  # ranks wait for rank 0's range test
    if device.type == "cuda":
        device, found = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= found:
            raise ValueError(f"torchrun --nproc_per_node: {device.index + 1} or more, for {found} GPUs")
        torch.cuda.set_device(device)
        options |= {"backend": "nccl", "device_id": device}
    dist.init_process_group(**options)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return device


def from_rank_0(make):
    """Call make() on rank 0 alone and return its result on every rank."""
    box = [make() if ranks()[0] == 0 else None]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_of_ranks(tensor, buffers=()):
    """The sum of a tensor over all ranks, in place; buffers become those of rank 0."""
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
        for buffer in buffers:  # without synchronised batch norm (gloo) each rank has statistics of its own
            dist.broadcast(buffer, src=0)
    return tensor


# ---------------------------------------------------------------- optimizers and schedules
def make_optimizer(name, net, lr):
    """The paper's optimizer (sgd) or another; fused, or fp16's scaler would wait for the GPU every step."""
    if name == "adamw":
        return torch.optim.AdamW(net.parameters(), lr, fused=True)
    assert name == "sgd", name
    optimizer = torch.optim.SGD(net.parameters(), lr, MOMENTUM, fused=True)
    for parameter in net.parameters():  # fused SGD leaves them unwritten where fp16 skips the first step
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scheduler(name, optimizer, epochs):
    """The paper's schedule (plateau) or another; fit gives the validation loss to plateau alone."""
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    assert name == "plateau", name
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", PLATEAU_FACTOR, PLATEAU_PATIENCE)


# ---------------------------------------------------------------- training
def train_epoch(net, batches, optimizer, scaler, mean, std, device, amp, layout):
    """Train on all batches; returns their losses on the device: reading one back would make the GPU wait."""
    net.train()
    losses = []
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose activations need the memory
        images = images.to(device, non_blocking=True).contiguous(memory_format=layout)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, AMP_DTYPES[amp], amp != "off"):
            loss = cross_entropy(net(datasets.normalise(images, mean, std)), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses)


def timed(batches, steps, batch_size):
    """Yield the batches; after the 50th (the first 10 warm up) print the speed and how long steps take."""
    for number, batch in enumerate(batches, 1):
        yield batch
        if number == 10:
            start = time.perf_counter()
        if number == 50:
            speed = 40 * batch_size / (time.perf_counter() - start)
            left = datetime.timedelta(seconds=round(steps * batch_size / speed))
            print(f"{speed:.0f} images/s, about {left} left without validation", flush=True)


@torch.inference_mode()
def predict(
    net,
    data,
    *,
    image_size=224,
    mean,
    std,
    workers=0,
    device="cpu",
    amp="off",
    memory_format="channels_last",
    alone=False,
):
    """Logits, float32 [N, C] on the CPU, of N images (Cells), resized and normalised; net in eval mode.

    The ranks of torchrun share the images, unless alone (one rank calls it).
    """
    device, (rank, number) = torch.device(device), (0, 1) if alone else ranks()
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    starts = range(0, len(data), EVAL_BATCH_SIZE)[rank::number]
    rows = [range(i, min(i + EVAL_BATCH_SIZE, len(data))) for i in starts]
    batches = datasets.loader(datasets.Batches(data, image_size), rows, workers, device.type == "cuda")
    logits = torch.zeros(len(data), len(data.classes), device=device)
    net.eval()
    for row, (images, _) in zip(rows, tqdm(batches, "predicting", leave=False, disable=rank > 0 or None)):
        images = images.to(device, non_blocking=True).contiguous(memory_format=LAYOUTS[memory_format])
        with torch.autocast(device.type, AMP_DTYPES[amp], amp != "off"):
            out = net(datasets.normalise(images, mean, std))
        logits[row.start : row.stop] = out.float()
    return logits.cpu() if alone else sum_of_ranks(logits).cpu()


def wrap(net, device, compile):
    """The module for the training steps: shared by the ranks, compiled. Evaluation and saving use net."""
    cuda, number = device.type == "cuda", ranks()[1]
    if compile and cuda and any(isinstance(module, torch.nn.SyncBatchNorm) for module in net.modules()):
        print("--compile: left out, since synchronised batch norm breaks the graph in every layer")
        compile = False
    if number > 1:
        net = torch.nn.parallel.DistributedDataParallel(
            net, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    if not compile:
        return net
    torch.compiler.reset()  # the fold before has another network; CUDA graphs do not go with several ranks
    return torch.compile(net, mode="reduce-overhead" if cuda and number == 1 else None)


def fit(
    folder,
    net,
    train,
    val,
    *,
    lr,
    epochs=75,
    batch_size=32,
    seed=0,
    fold=0,
    image_size=224,
    mean,
    std,
    crop=True,
    workers=0,
    device="cpu",
    amp="off",
    memory_format="channels_last",
    compile=False,
    stop_lr=0.0,
    optimizer="sgd",
    schedule="plateau",
    info=None,
):
    """Train net on train and choose the epoch on val (both Cells); returns the rows of log.csv as dicts.

    Resumes from folder/last.pt. Leaves net as in the last epoch, log.csv, and best.pt: the first epoch of
    highest validation accuracy, with what info says besides (models.load_checkpoint needs model and init).
    SystemExit if the loss is not finite, or last.pt is of other settings or images. (Paper, 2.2, 2.3)
    """
    folder, device, layout = pathlib.Path(folder), torch.device(device), LAYOUTS[memory_format]
    cuda, images, (rank, number) = device.type == "cuda", digest_of(train.paths, val.paths), ranks()
    settings = {
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
        "fold": fold,
        "image_size": image_size,
        "crop": crop,
        "optimizer": optimizer,
        "schedule": schedule,
        "images": images,
    }
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    prediction = {
        "mean": mean,
        "std": std,
        "image_size": image_size,
        "workers": workers,
        "device": device,
        "amp": amp,
        "memory_format": memory_format,
    }
    net.to(device, memory_format=layout)
    if cuda and number > 1:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = make_optimizer(optimizer, net, lr)
    scheduler = make_scheduler(schedule, optimizer, epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    history, best = resume(folder, parts, settings, epochs)
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, fold, rank, number)
    batches = datasets.loader(datasets.Batches(train, image_size, seed, fold, crop), order, workers, cuda)
    wrapped = wrap(net, device, compile)
    with concurrent.futures.ThreadPoolExecutor(1) as writer:  # writes while the next epoch trains
        writing, first = None, len(history) + 1
        for epoch in range(first, epochs + 1):
            start, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
            if rate < stop_lr * lr * (1 - 1e-6):  # not by rounding: 0.1 * 0.1 is not below 0.01
                break
            order.epoch = epoch
            steps = iter(batches)
            seed_all(DROPOUT, seed, fold, epoch, rank)  # after iter(), which draws from the generator too
            steps = tqdm(steps, f"epoch {epoch}/{epochs}", len(batches), False, disable=rank > 0 or None)
            if epoch == first:
                steps = timed(steps, (epochs - epoch + 1) * len(batches), batch_size)
            losses = train_epoch(wrapped, steps, optimizer, scaler, mean, std, device, amp, layout)
            train_loss = (sum_of_ranks(losses, net.buffers()) / number).cpu().mean().item()
            speed = len(batches) * batch_size / (time.perf_counter() - start)
            logits, targets = predict(net, val, **prediction), torch.from_numpy(val.targets)
            val_loss = cross_entropy(logits, targets).item()
            accuracy = (logits.argmax(1) == targets).double().mean().item()
            if writing:
                writing.result()
            if not math.isfinite(train_loss + val_loss):
                raise SystemExit(
                    f"{folder}: the loss is not finite in epoch {epoch}, at rate {rate:.3g}; "
                    "remove the folder and start again with a lower --lr or --amp off"
                )
            if schedule == "plateau":
                scheduler.step(val_loss)
            else:
                scheduler.step()
            seconds = time.perf_counter() - start
            history.append(
                {
                    "epoch": epoch,
                    "lr": rate,
                    "train_loss": train_loss,
                    "val_loss": val_loss,
                    "val_accuracy": accuracy,
                    "images_per_second": speed,
                    "seconds": seconds,
                }
            )
            if rank == 0:
                state = {name: to_cpu(part.state_dict()) for name, part in parts.items()}
                if best is None or accuracy > best["val_accuracy"]:
                    counts = np.bincount(train.targets, minlength=len(train.classes)).tolist()
                    best = {
                        **(info or {}),
                        "classes": train.classes,
                        "train_counts": counts,
                        "fold": fold,
                        "mean": mean.tolist(),
                        "std": std.tolist(),
                        "image_size": image_size,
                        "epoch": epoch,
                        "val_accuracy": accuracy,
                        "state_dict": state["net"],
                    }
                last = {"settings": settings, "history": history[:], "best": best}
                writing = writer.submit(save_epoch, folder, state | last)
            left = datetime.timedelta(seconds=round((epochs - epoch) * seconds))
            print(
                f"epoch {epoch}/{epochs}: lr {rate:.2g}, train loss {train_loss:.4f}, val loss "
                f"{val_loss:.4f}, val accuracy {accuracy:.4f}, {speed:.0f} images/s, {left} left",
                flush=True,
            )
        if writing:
            writing.result()
    if rank == 0:
        save(folder / "best.pt", best)
    return history


# ---------------------------------------------------------------- checkpoints
def to_cpu(state):
    """A copy of nested dicts, all tensors on the CPU, in the memory format that fused optimizers rely on."""
    if torch.is_tensor(state):
        return state.detach().to("cpu", copy=True)
    if not isinstance(state, dict):
        return copy.deepcopy(state)
    copied = copy.copy(state)  # with _metadata, without which a few networks cannot be loaded
    copied.update((key, to_cpu(value)) for key, value in state.items())
    return copied


def save(file, content):
    """torch.save, so that the file appears whole or not at all; OSError if the disk is full."""
    with datasets.open_atomic(file) as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as error:  # PyTorch's writer hides the reason
            raise OSError(f"{file}: cannot be written, disk full? ({str(error)[:90]!r})") from None


def digest_of(*parts):
    """SHA-256 of lines of text (paths, say), in one or more parts, in hexadecimal."""
    text = "\n\n".join(map("\n".join, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def save_epoch(folder, last):
    """Write last.pt (all that training resumes from, and the best epoch so far), then log.csv."""
    save(folder / "last.pt", last)
    write_log(folder, last["history"])


def write_log(folder, history):
    """log.csv, one row an epoch."""
    with datasets.open_atomic(folder / "log.csv", "w") as handle:
        rows = csv.DictWriter(handle, history[0])
        rows.writeheader()
        rows.writerows(history)


def resume(folder, parts, settings, epochs):
    """Load last.pt into parts (a dict); returns (history, checkpoint of the best epoch), or ([], None).

    SystemExit if it was begun with other settings (a dict).
    """
    file, advice = folder / "last.pt", f"remove {folder} to train it anew"
    if not file.exists():
        return [], None
    last = models.read_file(file, advice)
    before = last.get("settings", settings)
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        raise SystemExit(f"{file}: begun with other {', '.join(changed)}; {advice}, or name another")
    try:
        for name, part in parts.items():
            part.load_state_dict(last[name])
        history, best = last["history"], last["best"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        raise SystemExit(f"{file}: cannot resume from it ({why}); {advice}") from None
    if ranks()[0] == 0:
        write_log(folder, history)  # a kill may have come between the two files
    done = "; there is nothing left to train" if len(history) >= epochs else ""
    print(f"{folder}: resumes after epoch {len(history)}{done}", flush=True)
    return history, best


# ---------------------------------------------------------------- learning rate range test
def range_test(
    net,
    train,
    *,
    batch_size,
    seed,
    image_size,
    mean,
    std,
    crop,
    workers,
    device,
    amp,
    memory_format,
    optimizer="sgd",
):
    """Train net on train (Cells) for 100 steps at exponentially rising rates, or until the loss explodes.

    Returns the rate and the loss of each step, lists of up to 100 numbers.
    """
    layout = LAYOUTS[memory_format]
    net.to(device, memory_format=layout)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))

    def prepare(module, inputs):
        return datasets.normalise(inputs[0].contiguous(memory_format=layout), mean, std)

    net.register_forward_pre_hook(prepare, prepend=True)
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, 0)
    order.epoch, order.batches = 0, RANGE_STEPS  # 100 batches however small the data set is
    batches = datasets.Batches(train, image_size, seed, 0, crop)
    optimizer = make_optimizer(optimizer, net, RANGE_LOW)
    finder = torch_lr_finder.LRFinder(
        net,
        optimizer,
        torch.nn.CrossEntropyLoss(),
        device,
        amp_backend="torch",
        amp_config={"device_type": device.type, "dtype": AMP_DTYPES[amp], "enabled": amp != "off"},
        grad_scaler=torch.amp.GradScaler(device.type, enabled=amp == "fp16"),
    )
    finder.state_cacher.cached.clear()  # its copy of the weights, on the device
    seed_all(DROPOUT, seed, 0, 0, 0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        finder.range_test(
            datasets.loader(batches, order, workers, device.type == "cuda"),
            end_lr=RANGE_HIGH,
            num_iter=RANGE_STEPS,
            smooth_f=RANGE_SMOOTHING,
        )
    smoothed = np.array([float(loss) for loss in finder.history["loss"]])  # as the library stops by it
    losses = (smoothed[1:] - (1 - RANGE_SMOOTHING) * smoothed[:-1]) / RANGE_SMOOTHING
    return finder.history["lr"], [*smoothed[:1].tolist(), *losses.tolist()]


def try_lr(net, train, val, lr, *, steps, batch_size, seed, crop, optimizer, **options):
    """Train net on train for some steps at a constant rate; mean recall of the classes of val, half way and
    at the end. options: predict's."""
    device, amp, layout = options["device"], options["amp"], LAYOUTS[options["memory_format"]]
    net.to(device, memory_format=layout)
    mean, std = (torch.tensor(options[key], dtype=torch.float32, device=device) for key in ("mean", "std"))
    optimizer = make_optimizer(optimizer, net, lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, 0)
    order.batches = steps // 2
    batches = datasets.Batches(train, options["image_size"], seed, 0, crop)
    batches = datasets.loader(batches, order, options["workers"], device.type == "cuda")
    recalls, images = [], np.bincount(val.targets)
    for half in (1, 2):
        order.epoch = half
        iterator = iter(batches)
        seed_all(DROPOUT, seed, 0, half, 0)
        iterator = tqdm(iterator, f"trying the rate {lr:g}", len(batches), leave=False, disable=None)
        train_epoch(net, iterator, optimizer, scaler, mean, std, device, amp, layout)
        right = predict(net, val, alone=True, **options).argmax(1).numpy() == val.targets
        recalls.append((np.bincount(val.targets, right)[images > 0] / images[images > 0]).mean())
    print(f"rate {lr:g}: mean recall {np.mean(recalls):.4f} after {steps // 2} and {steps} steps", flush=True)
    return float(np.mean(recalls))


def middle_rate(candidates, images):
    """(The middle of the good rates, is any better than chance?), of candidates [(rate, mean recall)].

    images: numbers of validation images of the classes. The geometric mean of the rates, each weighted by how
    likely it is to be as good as the best: exp(-z²/2), z being its difference from the best mean recall in
    standard errors. The images' part of their variance is doubled, since training has as much luck.
    """

    def variance(recall):  # of a mean recall, by the choice of images
        return recall * (1 - recall) * (1 / images).sum() / len(images) ** 2

    rates, recalls = np.array(candidates).T
    best, chance = recalls.max(), 1 / len(images)
    spread = 4 * variance(best) + 1e-12  # of a difference; a perfect recall has none
    weights = np.exp(-((best - recalls) ** 2) / 2 / spread)
    rate = np.exp(np.average(np.log(rates), weights=weights))
    return float(f"{rate:.2g}"), best > chance + math.sqrt(variance(chance))


def find_lr(folder, make_net, train, val, *, epochs, data=None, weights=None, **options):
    """The initial learning rate of a model and init, once for all folds, from fold 0 (measured.json).

    The range test says where the loss explodes. Each of five rates that lies below is tried on a new network;
    middle_rate chooses by their mean recalls. Both together take at most half of one fold's steps; a run too
    short for that takes the middle one of the five.
    """
    if not len(train) or not len(val):
        raise SystemExit(
            f"{folder}: fold 0 has no images to train on or to validate with, by which the rate "
            "of all folds is found; set it with --lr, or use another split.csv"
        )
    file, steps = folder / "measured.json", epochs * math.ceil(len(train) / options["batch_size"])
    steps = min((steps // 2 - RANGE_STEPS) // len(TRIAL_SHARES), TRIAL_MAX_STEPS)
    middle = OPTIMIZERS[options["optimizer"]]
    tried = [float(f"{middle * share:.1g}") for share in TRIAL_SHARES]
    some = np.random.default_rng([TRIAL, options["seed"]]).permutation(len(val))
    share = math.ceil(TRIAL_VAL_IMAGES / len(val.classes))  # of each class: they count alike
    some = [some[val.targets[some] == c][:share] for c in range(len(val.classes))]
    val = val.subset(np.sort(np.concatenate(some)))
    same = {key: options[key] for key in ("optimizer", "batch_size", "image_size", "seed")}
    same |= {"epochs": epochs, "data": data, "weights": weights}
    with datasets.file_lock(folder / "measured.lock"):
        found = datasets.read_json(file) if file.exists() else {}
        for key, value in same.items():
            if found.setdefault(key, value) != value:
                raise SystemExit(
                    f"{file}: measured with {key} {found[key]}, not {value}; remove it, or give "
                    "this row a --name of its own"
                )
        if "lr" in found:
            return found["lr"]
        found["candidates"] = []
        if steps >= TRIAL_MIN_STEPS:
            rates, losses = range_test(make_net(0), train, **options)
            with datasets.open_atomic(folder / "lr_range.csv", "w") as handle:
                csv.writer(handle).writerows([("lr", "loss"), *zip(rates, losses)])
            for lr in [lr for lr in tried if lr < rates[-1]]:
                found["candidates"].append((lr, try_lr(make_net(0), train, val, lr, steps=steps, **options)))
            torch.cuda.empty_cache()  # other jobs of this GPU may need it
        found["lr"], learned, why = middle, False, "too few steps to try rates"
        if found["candidates"]:
            images = np.unique(val.targets, return_counts=True)[1]
            found["lr"], learned = middle_rate(found["candidates"], images)
            why = "no network learned in the trial"
        if not learned:
            print(f"{folder}: {why}: learning rate {found['lr']:g}; --lr sets another")
        with datasets.open_atomic(file, "w") as handle:
            json.dump(found, handle)
    return found["lr"]


# ---------------------------------------------------------------- one run
@contextlib.contextmanager
def lock(folder):
    """Hold the run's lock inside the block; yields False if another process holds it.

    By lockf: a flock would live on in data workers. (datasets.file_lock, for what is made once, waits.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        ours = True
        try:
            if ranks()[0] == 0:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for leftover in folder.glob(".*.tmp"):  # of a killed process
                    leftover.unlink()
        except BlockingIOError:
            ours = False
        except OSError as error:
            raise SystemExit(
                f"{handle.name}: cannot be locked ({error.strerror}); name a --runs folder on a "
                "file system that has locks"
            ) from None
        yield from_rank_0(lambda: ours)


def initial_weights(runs, model, init, weights):
    """What build_model starts from: None, the name of ImageNet weights, or the path of a checkpoint."""
    if init in ("random", "imagenet"):
        return None if init == "random" else weights
    folder = runs / "pretrain" / model / init
    file = init.split("=", 1)[1] if "=" in init else folder / "best.pt"
    if "=" in init and not os.path.isfile(file):
        raise SystemExit(f"--init {init}: {file!r} is no file; {models.OURS}")
    if "=" not in init and not (folder / "predictions.csv").exists():
        raise SystemExit(
            f"{folder}: no finished pre-training; run first: python pretrain.py --model {model} "
            f"--init {init} --runs {runs}"
        )
    return os.path.abspath(file)


def check_settings(folder, settings):
    """SystemExit if the run in the folder was begun with other settings, by its config.json."""
    if not any(folder.glob("*.pt")) or not (folder / "config.json").exists():
        return
    before = datasets.read_json(folder / "config.json")
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if {"data", "split", "weights"} & {*changed}:
        what = {"data": "images", "weights": "initial weights"}
        what = ", ".join(what.get(key, key) for key in changed)
        raise SystemExit(
            f"{folder}: begun with other {what}; put back what it was, remove the folder, or "
            "name another with --runs"
        )
    if changed:
        changed = "; ".join(f"{key} was {before.get(key)}, is now {settings[key]}" for key in changed)
        raise SystemExit(
            f"{folder}: begun with other settings ({changed}); use those, remove the folder, or "
            "name another with --runs (and copy split.csv there)"
        )


def digest(file):
    """SHA-256 of a file in hexadecimal; None for None."""
    if file is None:
        return None
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions():
    """What the results depend on besides the settings."""
    commit = None
    with contextlib.suppress(OSError):  # no git on this machine
        git = ["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "--verify", "-q", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torchvision": models.torchvision.__version__,
        "commit": commit,
    }


def run(
    folder, shared, cells, info, parts, *, model, init, weights, fold, lr, memory_format, crop=True, **options
):
    """One fine-tuning or pre-training from its initial weights to predictions.csv; returns the exit status.

    cells: all readable images; parts: str [N, folds], train, val or test. Without test images those of val
    are predicted. shared: the folder of what is measured once for all folds. options: further ones of fit.
    """
    train, val, test = (cells.subset(parts[:, fold] == part) for part in ("train", "val", "test"))
    if not len(train) or not len(val):
        raise SystemExit(
            f"{cells.root}: {len(train)} images to train on and {len(val)} to validate with in "
            f"fold {fold}, which needs both: more images, or another split.csv"
        )
    split = digest_of(map(",".join, sorted(zip(cells.paths, parts[:, fold]))))
    settings = {"model": model, "init": init, "data": info["fingerprint"], "split": split, "fold": fold}
    settings |= {key: value for key, value in options.items() if key not in ("device", "workers", "compile")}
    device, images = options["device"], {"mean": info["mean"], "std": info["std"]}
    common = images | {key: options[key] for key in ("image_size", "workers", "device", "amp")}
    file = models.imagenet_file(model, weights)[1] if models.is_imagenet(weights) else weights

    def make_net(number):
        seed_all(WEIGHTS, options["seed"], number)
        return models.build_model(model, len(cells.classes), weights, options["image_size"])

    with lock(folder) as ours:
        if not ours:
            print(f"{folder}: busy, another process is working on it", file=sys.stderr)
            return BUSY
        amp = settings.pop("amp")  # a finished run is not refused where auto chooses another precision
        if file is None or os.path.exists(file):  # ImageNet's may still have to be fetched
            settings["weights"] = digest(file)
        check_settings(folder, settings | ({} if lr == "auto" else {"lr": lr}))
        if from_rank_0(lambda: (folder / "predictions.csv").exists()):
            (folder / "last.pt").unlink(missing_ok=True)
            print(f"{folder}: finished, nothing to do")
            return 0
        net = make_net(fold)
        settings["weights"] = digest(file)
        if memory_format == "auto":  # grouped convolutions are slow in channels_last on some GPUs
            grouped = any(getattr(module, "groups", 1) > 1 for module in net.modules())
            memory_format = "contiguous" if grouped and device.type == "cuda" else "channels_last"
        common["memory_format"] = memory_format
        if lr == "auto":
            search = common | {key: options[key] for key in ("batch_size", "seed", "optimizer", "epochs")}
            search |= {"crop": crop, "data": info["fingerprint"], "weights": settings["weights"]}
            first = [cells.subset(parts[:, 0] == part) for part in ("train", "val")]  # of fold 0, for all
            lr = from_rank_0(lambda: find_lr(shared, make_net, *first, **search))
        settings |= {"lr": lr, "amp": amp, "memory_format": memory_format}
        check_settings(folder, settings)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        record = {
            "name": shared.name,
            "root": os.path.abspath(cells.root),
            "left_out": info["unreadable"],
            "train_images": len(train),
            "val_images": len(val),
            "test_images": len(test),
            "device": str(device),
            "gpu": gpu,
            "workers": options["workers"],
            "ranks": ranks()[1],
            "compile": options["compile"],
            "versions": versions(),
            "command": sys.argv,
        }
        if ranks()[0] == 0:
            with datasets.open_atomic(folder / "config.json", "w") as handle:
                json.dump(settings | record, handle, indent=1)
        fit(
            folder,
            net,
            train,
            val,
            lr=lr,
            fold=fold,
            memory_format=memory_format,
            crop=crop,
            info={"model": model, "init": init},
            **images,
            **options,
        )
        publish(folder, net, val, test, **common)
    return 0


def publish(folder, net, val, test, **options):
    """Write the best epoch's predictions, last predictions.csv, since it says that the run is finished."""
    from_rank_0(lambda: None)  # rank 0 has written best.pt by now
    best = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
    net.load_state_dict(best["state_dict"])
    if len(test):
        write_predictions(folder / "val_predictions.csv", val, predict(net, val, **options))
    final = test if len(test) else val
    logits = predict(net, final, **options)
    write_predictions(folder / "predictions.csv", final, logits)
    if ranks()[0] == 0:
        (folder / "last.pt").unlink(missing_ok=True)
    accuracy = (logits.argmax(1).numpy() == final.targets).mean()
    print(f"{folder}: finished; accuracy of epoch {best['epoch']} {accuracy:.4f} on {len(final)} images")


def write_predictions(file, cells, logits):
    """CSV of path, label, prediction and the probability of each class, from logits [N, C]; by rank 0."""
    if not logits.isfinite().all():
        raise SystemExit(f"{file}: some probabilities are not finite; train anew, with --amp off")
    if ranks()[0]:
        return
    with datasets.open_atomic(file, "w") as handle:
        rows = csv.writer(handle)
        rows.writerow(["path", "label", "prediction", *(f"p_{label}" for label in cells.classes)])
        for path, target, p in zip(cells.paths, cells.targets, logits.double().softmax(1).numpy()):
            values = [f"{value:.7g}" for value in p]
            rows.writerow([path, cells.classes[target], cells.classes[p.argmax()], *values])


# ---------------------------------------------------------------- options
def add_options(parser):
    """The options that train.py and pretrain.py share."""
    parser.add_argument("--model", required=True, help="resnet152, vit_l_32, ... or any of torchvision")
    parser.add_argument("--runs", type=pathlib.Path, default="runs", help="results of one target data set")
    parser.add_argument("--epochs", type=int, default=75)
    parser.add_argument("--batch-size", type=int, default=32, help="shared by the ranks of torchrun")
    parser.add_argument("--lr", default="auto", help="initial learning rate (auto: by range test and trial)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="imagenet", help="ImageNet weights by torchvision's name")
    parser.add_argument("--stop-lr", type=float, default=0.0, help="stop below this share of the first rate")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="of the learning rate")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--workers", default="auto", help="data loading processes (of each rank)")
    parser.add_argument(
        "--amp", choices=["auto", *AMP_DTYPES], default="auto", help="mixed precision (off on CUDA is TF32)"
    )
    parser.add_argument("--memory-format", choices=["auto", *LAYOUTS], default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile, with CUDA graphs on CUDA")


def run_options(args, parser):
    """Check the shared options (parser.error for an impossible value); returns run's keyword arguments."""

    def check(name, fine, need):
        if not fine:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {need}")

    for name, least in (("epochs", 1), ("batch_size", 1), ("image_size", 1), ("seed", 0)):
        check(name, getattr(args, name) >= least, f"at least {least}")
    check("stop_lr", 0 <= args.stop_lr <= 1, "from 0 to 1")
    check("stop_lr", args.schedule == "plateau" or not args.stop_lr, "0 unless the schedule is plateau")
    check("workers", args.workers == "auto" or args.workers.isdecimal(), "auto or a whole number")
    with contextlib.suppress(ValueError):
        args.lr = args.lr if args.lr == "auto" else float(args.lr)
    fine = args.lr == "auto" or isinstance(args.lr, float) and 0 < args.lr < math.inf
    check("lr", fine, "auto or a number above 0")
    try:
        weights = args.weights if args.init.startswith("imagenet") else None
        models.check_name(args.model, args.image_size, weights)
        device = join_ranks(choose_device(args.device))
    except ValueError as error:
        parser.error(str(error))
    check("batch_size", args.batch_size % ranks()[1] == 0, f"a multiple of the {ranks()[1]} ranks")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    names = "model lr seed batch_size epochs image_size stop_lr optimizer schedule memory_format compile"
    workers = choose_workers(args.workers, device, args.batch_size // ranks()[1], args.image_size)
    chosen = {"device": device, "amp": choose_amp(device, args.amp), "workers": workers}
    return {name: getattr(args, name) for name in names.split()} | chosen


# ---------------------------------------------------------------- data and split
def open_checked(data, runs):
    """The readable images of a data set as Cells, and what the pass over it found (check_dataset)."""
    cells = datasets.open_dataset(data)
    info = from_rank_0(lambda: datasets.check_dataset(cells, runs))
    unreadable = [path for path, _ in info["unreadable"]]
    print(f"{cells.root}: {len(cells)} images in {len(cells.classes)} classes ({', '.join(cells.classes)})")
    notes = [f"{path} cannot be read ({why}): left out" for path, why in info["unreadable"][:5]]
    if len(unreadable) > 5:
        notes.append(f"and {len(unreadable) - 5} unreadable images more, see {runs}/data/{cells.name}.json")
    if ranks()[0] == 0:
        for note in info["notes"] + notes:
            print(f"  {note}", file=sys.stderr)
    return cells.subset(~np.isin(cells.paths, unreadable)), info


def open_split(file, cells, unreadable):
    """(images of the split, their parts: str [N, folds]); without a file makes a stratified 5-fold split."""
    names = np.array(cells.classes)[cells.targets]
    with datasets.file_lock(file.with_name(".split.lock")):
        if not file.exists():
            parts = splits.make_splits(cells.targets, groups=cells.groups)
            splits.write_splits(file, cells.paths, names, parts)
            print(f"{file}: new stratified split into 5 folds")
            images = zip(cells.classes, np.bincount(cells.targets, minlength=len(cells.classes)))
            if few := [f"{name} ({number})" for name, number in images if number < 5]:
                print(f"  fewer than 5 images, so not tested in each fold: {', '.join(few)}", file=sys.stderr)
    paths, labels, parts = splits.read_splits(file)
    gone = sorted(set(paths) - set(cells.paths) - set(unreadable))
    if gone:
        raise SystemExit(
            f"{file}: {len(gone)} of its {len(paths)} images are not in {cells.root}, e.g. "
            f"{gone[0]}; put them back, or name another folder with --runs"
        )
    row = {path: i for i, path in enumerate(paths)}
    rows = np.array([row.get(path, -1) for path in cells.paths])
    wrong = cells.paths[(rows >= 0) & (np.array(labels)[rows] != names)]
    if len(wrong):
        raise SystemExit(
            f"{file}: {len(wrong)} labels differ from the class folders, e.g. of {wrong[0]}; "
            "correct it or remove it"
        )
    if (rows < 0).any():
        print(
            f"{file}: {(rows < 0).sum()} images of {cells.root} are not in it: left out, e.g. "
            f"{cells.paths[rows < 0][0]}",
            file=sys.stderr,
        )
    return cells.subset(rows >= 0), parts[rows[rows >= 0]]


# ---------------------------------------------------------------- how a script ends
def interrupt(number, frame):
    """Ctrl-C and SIGTERM: KeyboardInterrupt, once, and no complaint of PyTorch's about dead data workers.

    A little later if one is just being forked: what is raised there, Python ignores (os.register_at_fork).
    """
    if any(inside.f_code.co_name == "_launch" for inside, _ in traceback.walk_stack(frame)):
        signal.signal(signal.SIGALRM, lambda _, frame: interrupt(number, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        return
    for other in (signal.SIGALRM, signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(other, lambda *_: None)  # not SIG_DFL: Python complains if one is on its way already
    raise KeyboardInterrupt(number)


def explain(error):
    """One line for an error that a user can mend; of any other prints the traceback and returns 1.

    run_all.sh shows the last line, and leaves a job out of memory to other GPUs.
    """
    text = str(error).strip()
    if any(words in text for words in OUT_OF_MEMORY):
        return (
            f"out of memory ({text.splitlines()[0]}): lower --batch-size or --image-size, or run fewer "
            "jobs on this GPU; under torchrun the range test has a whole batch on one GPU, which --lr "
            "RATE does without"
        )
    if "C compiler" in text or "C++ compiler" in text:
        return "--compile: no C++ compiler found; install g++, or train without --compile"
    if isinstance(error, OSError) or any(words in text for words in (*DEAD_WORKER, *datasets.UNREADABLE)):
        named = getattr(error, "filename", None)
        text = f"{named}: {error.strerror}" if named else text.splitlines()[-1]
        return f"{text}; put it right, or name another folder with --runs, and the same command resumes"
    traceback.print_exception(error)
    return text.splitlines()[0] if "CUDA error" in text else 1  # below stands general advice


def run_main(main):
    """Run a script's main and exit with its status; what a user can mend ends in one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # folders may have any name
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        status = main()
    except KeyboardInterrupt as stop:
        status, name = 128 + stop.args[0], signal.Signals(stop.args[0]).name
        print(f"\nstopped by {name}; the same command resumes after the last saved epoch", file=sys.stderr)
    except SystemExit as end:
        status = end.code
    except BrokenPipeError:  # nobody reads the output any more
        os._exit(128 + signal.SIGPIPE)
    except Exception as error:
        status = explain(error)
    if isinstance(status, str):
        print(status, file=sys.stderr)
    if status:  # leave at once: an ordinary exit waits for data workers that hang and for the other ranks
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1 if isinstance(status, str) else status)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


# ---------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--init", required=True, help=f"{', '.join(models.INITS)}, others, or NAME=PATH")
    parser.add_argument("--name", help="name of the row in Table 4 and of its folder (default: the init)")
    parser.add_argument("--fold", type=int, nargs="+", help="folds to train, from 0 (default: all)")
    parser.add_argument("--data", default="data/bm", help="folder of the data set")
    args = parser.parse_args()
    init, own = args.init.split("=")[0], args.runs / "pretrain" / args.model
    name = args.name or init
    if not re.fullmatch(r"\w[\w.+-]*", name) or "=" in args.init and init in ("random", "imagenet"):
        parser.error(
            f"--init {args.init}, --name {name}: a NAME (of NAME=PATH too) has letters, digits and "
            ".+- alone and is not random or imagenet"
        )
    if "=" not in args.init and args.init not in models.INITS and not (own / init).is_dir():
        parser.error(f"--init {init}: not one of {', '.join(models.INITS)}, and not in {own}")
    options = run_options(args, parser)
    weights = initial_weights(args.runs, args.model, args.init, args.weights)
    cells, info = open_checked(args.data, args.runs)
    before = {}
    if weights and os.path.isabs(weights) and pathlib.Path(weights).with_name("config.json").exists():
        before = datasets.read_json(pathlib.Path(weights).with_name("config.json"))
    if before.get("data") == info["fingerprint"]:
        raise SystemExit(
            f"{weights}: was trained on the very images of {cells.root}, those to be tested "
            "among them; start from other weights"
        )
    unreadable = [path for path, _ in info["unreadable"]]
    cells, parts = from_rank_0(lambda: open_split(args.runs / "split.csv", cells, unreadable))
    folds = range(parts.shape[1]) if args.fold is None else args.fold
    if not all(0 <= fold < parts.shape[1] for fold in folds):
        parser.error(f"--fold {' '.join(map(str, folds))}: split.csv has folds 0 to {parts.shape[1] - 1}")
    for kind, groups in splits.read_twins(args.runs, cells.name, cells.paths).items():
        if groups:
            print(f"test images that {kind} a training image, by fold: {splits.count_leaks(parts, groups)}")
    folder, status = args.runs / "train" / args.model / name, 0
    for fold in folds:
        status |= run(
            folder / f"fold{fold}",
            folder,
            cells,
            info,
            parts,
            init=init,
            weights=weights,
            fold=fold,
            **options,
        )
    return status


if __name__ == "__main__":
    run_main(main)
