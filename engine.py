"""Train a network on images: optimizers, epochs, checkpoints, predictions, several GPUs.

    engine.fit("runs/mine", net, train, val, lr=0.003, mean=mean, std=std, device="cuda")

A run that was killed at any moment resumes after its last complete epoch, on a CPU bit for bit. To copy this
file into another project, take datasets.py along. train.py adds the command line and the test images.
"""

import concurrent.futures
import copy
import csv
import datetime
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import datasets

OPTIMIZERS, SCHEDULES = ("sgd", "adamw"), ("plateau", "cosine")
MOMENTUM = 0.9  # SGD without weight decay (paper, section 2.2)
PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.1, 3  # of the rate, after so many epochs without a lower validation loss
EVAL_BATCH_SIZE = 64
LOG = "epoch lr train_loss val_loss val_accuracy images_per_second seconds".split()  # columns of log.csv
WEIGHTS, DROPOUT, TRIAL = 3, 4, 5  # begin the keys of random streams; datasets.py has 1 and 2
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


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
        device, gpus = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= gpus:
            raise ValueError(f"torchrun --nproc_per_node: more processes than GPUs ({gpus})")
        torch.cuda.set_device(device)
        options |= {"backend": "nccl", "device_id": device}
    dist.init_process_group(**options)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
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
    weights = [weight for weight in net.parameters() if weight.requires_grad]  # not those that are frozen
    if name == "adamw":
        return torch.optim.AdamW(weights, lr, fused=True)
    assert name == "sgd", name
    optimizer = torch.optim.SGD(weights, lr, MOMENTUM, fused=True)
    for weight in weights:  # fused SGD leaves it unwritten where fp16 skips the first step
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def make_scheduler(name, optimizer, epochs):
    """The paper's schedule (plateau) or another."""
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    assert name == "plateau", name
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", PLATEAU_FACTOR, PLATEAU_PATIENCE)


def step_scheduler(scheduler, val_loss):
    """The end of an epoch; the validation loss is for the plateau alone."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(val_loss)
    else:
        scheduler.step()


def training_loss(logits, labels, smoothing=0.0):
    """What a batch is trained by: the paper's cross-entropy, or that of smoothed labels (torch's formula)."""
    return cross_entropy(logits, labels, label_smoothing=smoothing)


# ---------------------------------------------------------------- training and predictions
def train_mode(net):
    """net.train(); of a frozen network (models.freeze) batch norm and dropout stay as in evaluation."""
    net.train(all(weight.requires_grad for weight in net.parameters()))


def train_epoch(net, batches, optimizer, scaler, mean, std, device, amp, layout, smoothing=0.0):
    """Train on all batches; returns their losses on the device: reading one back would make the GPU wait."""
    train_mode(net)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose activations need the memory
        images = images.to(device, non_blocking=True).contiguous(memory_format=layout)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, AMP_DTYPES[amp], amp != "off"):
            loss = training_loss(net(datasets.normalise(images, mean, std)), labels, smoothing)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses)


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
    device = torch.device(device)
    rank, number = (0, 1) if alone else ranks()
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    starts = range(0, len(data), EVAL_BATCH_SIZE)[rank::number]
    rows = [range(start, min(start + EVAL_BATCH_SIZE, len(data))) for start in starts]
    batches = datasets.loader(datasets.Batches(data, image_size), rows, workers, device.type == "cuda")
    batches = tqdm(batches, "predicting", leave=False, disable=rank > 0 or None)
    logits = torch.zeros(len(data), len(data.classes), device=device)
    net.eval()
    for row, (images, _) in zip(rows, batches):
        images = images.to(device, non_blocking=True).contiguous(memory_format=LAYOUTS[memory_format])
        with torch.autocast(device.type, AMP_DTYPES[amp], amp != "off"):
            out = net(datasets.normalise(images, mean, std))
        logits[row.start : row.stop] = out.float()
    return logits.cpu() if alone else sum_of_ranks(logits).cpu()


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


def wrap(net, device, compile):
    """The module for the training steps: shared by the ranks, or compiled. Evaluation and saving use net."""
    if ranks()[1] > 1:
        if device.type == "cuda":
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place: net's own children change
        return torch.nn.parallel.DistributedDataParallel(
            net, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    if not compile:
        return net
    torch.compiler.reset()  # the fold before has another network
    return torch.compile(net, mode="reduce-overhead" if device.type == "cuda" else None)


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
    smoothing=0.0,
    colour=0.0,
    info=None,
):
    """Train net on train and choose the epoch on val (both Cells); returns the rows of log.csv as dicts.

    Resumes from folder/last.pt; the caller sees to it that the settings are the same. Leaves net as in the
    last epoch, log.csv, and best.pt: the first epoch of highest validation accuracy, with what info says
    besides (models.load_checkpoint needs model and init). SystemExit if the loss is not finite (paper, 2.2).
    """
    folder, device, layout = pathlib.Path(folder), torch.device(device), LAYOUTS[memory_format]
    rank, number = ranks()
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    info = (info or {}) | {"fold": fold} | checkpoint_info(train, mean, std, image_size)
    images = {"mean": mean, "std": std, "image_size": image_size, "workers": workers}
    images |= {"device": device, "amp": amp, "memory_format": memory_format}
    net.to(device, memory_format=layout)
    optimizer = make_optimizer(optimizer, net, lr)
    scheduler = make_scheduler(schedule, optimizer, epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    how = mean, std, device, amp, layout, smoothing
    history = resume(folder, state, epochs, info)
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, fold, rank, number)
    batches = datasets.Batches(train, image_size, seed, fold, crop, colour)
    batches = datasets.loader(batches, order, workers, device.type == "cuda")
    wrapped = wrap(net, device, compile)
    with concurrent.futures.ThreadPoolExecutor(1) as writer:  # writes while the next epoch trains
        writing = writer.submit(int)  # nothing yet
        for epoch in range(len(history) + 1, epochs + 1):
            start, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
            if rate < stop_lr * lr * (1 - 1e-6):  # not by rounding: 0.1 * 0.1 is not below 0.01
                break
            order.epoch = epoch
            steps = iter(batches)
            seed_all(DROPOUT, seed, fold, epoch, rank)  # after iter(), which draws from the generator too
            steps = tqdm(steps, f"epoch {epoch}", len(batches), leave=False, disable=rank > 0 or None)
            losses = train_epoch(wrapped, steps, optimizer, scaler, *how)
            train_loss = (sum_of_ranks(losses, net.buffers()) / number).cpu().mean().item()
            speed = len(batches) * batch_size / (time.perf_counter() - start)
            val_loss, accuracy = validate(net, val, **images)
            step_scheduler(scheduler, val_loss)
            row = epoch, rate, train_loss, val_loss, accuracy, speed, time.perf_counter() - start
            history.append(dict(zip(LOG, row)))
            check_epoch(folder, history[-1], epochs)
            writing.result()  # raises what went wrong
            if rank == 0:
                last = {name: to_cpu(part.state_dict()) for name, part in state.items()}
                writing = writer.submit(save_epoch, folder, last | {"log": history[:]}, info)
    from_rank_0(writing.result)  # now every rank finds best.pt
    return history


def validate(net, val, **options):
    """(Mean cross-entropy, accuracy) of net on val (Cells); options: predict's."""
    logits, targets = predict(net, val, **options), torch.from_numpy(val.targets)
    return cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).double().mean().item()


def check_epoch(folder, row, epochs):
    """Print an epoch's row of log.csv and the time left; SystemExit if its loss is not finite."""
    epoch, losses = row["epoch"], (row["train_loss"], row["val_loss"])
    if not math.isfinite(sum(losses)):
        why = f"the loss is not finite in epoch {epoch}, at rate {row['lr']:.3g}"
        raise SystemExit(f"{folder}: {why}; remove the folder and train with a lower --lr or --amp off")
    left = datetime.timedelta(seconds=round((epochs - epoch) * row["seconds"]))
    text = "train loss {:.4f}, val loss {:.4f}, val accuracy {:.4f}, ".format(*losses, row["val_accuracy"])
    text += f"{row['images_per_second']:.0f} images/s, {left} left"
    print(f"epoch {epoch}/{epochs}: lr {row['lr']:.2g}, {text}", flush=True)


# ---------------------------------------------------------------- checkpoints
def checkpoint_info(train, mean, std, image_size):
    """What best.pt says of the images: classes, their numbers, normalisation (tensors [3]) and size."""
    counts = np.bincount(train.targets, minlength=len(train.classes)).tolist()
    info = {"classes": train.classes, "train_counts": counts, "image_size": image_size}
    return info | {"mean": mean.tolist(), "std": std.tolist()}


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


def save_epoch(folder, last, info):
    """Write last.pt, then what follows from it: a kill in between is made good by resume."""
    save(folder / "last.pt", last)
    save_results(folder, last, info)


def save_results(folder, last, info):
    """Write best.pt if last's epoch is the best so far, and log.csv."""
    *earlier, row = last["log"]
    if all(row["val_accuracy"] > other["val_accuracy"] for other in earlier):
        best = {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"], "state_dict": last["net"]}
        save(folder / "best.pt", info | best)
    with datasets.open_atomic(folder / "log.csv", "w") as handle:
        rows = csv.DictWriter(handle, LOG)
        rows.writeheader()
        rows.writerows(last["log"])


def resume(folder, state, epochs, info):
    """Load folder/last.pt into state (a dict of net, optimizer, ...); returns log.csv's rows or []."""
    file = folder / "last.pt"
    if not file.exists():
        return []
    try:
        last = torch.load(file, map_location="cpu", weights_only=True)
        history = last["log"]
        for name, part in state.items():
            part.load_state_dict(last[name])
    except (OSError, MemoryError, torch.OutOfMemoryError):  # of the moment, no damage
        raise
    except Exception as error:  # EOFError, KeyError, ...: whatever damage leads to
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        advice = f"remove {folder} to train it anew"
        raise SystemExit(f"{file}: damaged or of another version, cannot resume ({why}); {advice}") from None
    if ranks()[0] == 0:
        save_results(folder, last, info)
    done = "; there is nothing left to train" if len(history) >= epochs else ""
    print(f"{folder}: resumes after epoch {len(history)}{done}", flush=True)
    return history
