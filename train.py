"""Fine-tune one network on bone marrow cells (or any folder of class folders), fold by fold, by the paper's protocol.

    python train.py --model vit_l_32 --init imagenet                   # all folds of data/bm, going on where it stopped
    python train.py --model resnet18 --init random --fold 0 --data data/mine --epochs 25 --image-size 96
    torchrun --standalone --nproc_per_node=4 train.py --model resnet152 --init imagenet+cd     # one run on four GPUs

Leaves runs/train/<model>/<init>/fold<k>/ with config.json, log.csv, best.pt, predictions.csv and val_predictions.csv.
Killed at any moment it goes on by the same command from the last finished epoch, on a CPU bit for bit. Exit status: 0
done, 1 bad data or a training gone wrong, 2 bad arguments, 75 another process works on the run, 128 + n by signal n
(torchrun turns all but 0 into 1).
"""
import argparse
import concurrent.futures
import contextlib
import copy
import csv
import datetime
import fcntl
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch_lr_finder
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import datasets
import models
import splits

MOMENTUM, PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.9, 0.1, 3  # section 2.2; SGD without weight decay
RANGE_LOW, RANGE_HIGH, RANGE_STEPS, RANGE_SMOOTHING = 1e-7, 10, 100, 0.05  # range test (section 2.2, torch-lr-finder)
RANGE_DROP_FIRST, RANGE_DROP_LAST, RANGE_DEFAULT_LR = 10, 5, 1e-2
EVALUATION_BATCH = 128
TOO_SMALL = ("Kernel size can't be greater", "Output size is too small", "more than 1 value per channel", "should be at least",
             "output size")  # PyTorch's words for a feature map that a network's layers have used up
BUSY = 75  # exit status EX_TEMPFAIL
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
COLUMNS = ("epoch", "lr", "train_loss", "val_loss", "val_accuracy", "images_per_second", "seconds")


# ---------------------------------------------------------------- machine
def ranks():
    """(rank, number of ranks) of this process: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(device):
    """Under torchrun join the process group (NCCL on CUDA, gloo on CPU) and return this rank's device."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # ranks wait for rank 0's checks and range test however long they take; torchrun ends them if one dies
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=7))
        if ranks()[0]:
            sys.stdout = open(os.devnull, "w")
        elif device.type == "cpu":
            print("gloo has no synchronised batch norm: each rank normalises by its own share of a batch")
    return device


def hidden():
    """tqdm's disable: a bar on a terminal, of rank 0 alone."""
    return True if ranks()[0] else None


def from_rank_0(make):
    """Call make() on rank 0 alone and give every rank its result; if it fails there, torchrun ends the others."""
    box = [make() if ranks()[0] == 0 else None]
    if ranks()[1] > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def choose_device(device):
    """torch.device of 'auto' (CUDA if there is any, else the CPU, said aloud), 'cpu', 'cuda', 'cuda:1'. ValueError if absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and os.environ.get("RANK", "0") == "0":
            print("no CUDA device found: working on the CPU", file=sys.stderr)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: not auto, cpu, cuda, cuda:1, ...")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device found; use --device cpu")
    device = torch.device(device)
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices, from cuda:0")
        torch.cuda.set_device(device)
    return device


def choose_amp(device, amp="auto"):
    """'bf16' where the hardware computes in it (CUDA capability 8, CPU with AVX-512 bf16 or AMX), 'fp16' on older CUDA, or 'off'."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    flags = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "off"


def choose_workers(device, workers="auto"):
    """Data workers: the cores that this process may use, shared among the jobs (JOBS, set by run_all.sh) and ranks of the machine."""
    if workers != "auto":
        return int(workers)
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or cores))
    cores //= int(os.environ.get("JOBS") or 1) * int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(16, cores - 1)) if device.type == "cuda" else min(1, cores // 2)


def amp_settings(amp):
    """torch.autocast's arguments for 'bf16', 'fp16' or 'off'."""
    return {"dtype": AMP_TYPES[amp] or torch.bfloat16, "enabled": amp != "off"}


def seed_all(*key):
    """Seed torch's global generators by a key such as (seed, fold, epoch, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


# ---------------------------------------------------------------- prediction
def predict(net, data, *, image_size=224, mean, std, batch_size=EVALUATION_BATCH, workers=0, device="cpu", amp="off"):
    """Logits float32 [N, C] on the CPU of the N images of data (Cells): resized and normalised alone, network in eval mode.

    Under torchrun each rank fills its rows of one zero tensor, and one all_reduce completes it on every rank.
    """
    batches = evaluation_loader(data, image_size, batch_size, workers, torch.device(device))
    return predict_batches(net, batches, len(data), mean, std, torch.device(device), amp)


def evaluation_loader(data, image_size, batch_size, workers, device):
    """This rank's batches of data in order."""
    rank, number = ranks()
    rows = [range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    return datasets.loader(datasets.Batches(data, image_size), rows[rank::number], workers, device.type == "cuda")


@torch.inference_mode()
def predict_batches(net, batches, count, mean, std, device, amp):
    """As predict, from a loader whose batch sampler is the list of its rows."""
    net.eval()
    logits = None
    for rows, (images, _) in zip(batches.batch_sampler, tqdm(batches, desc="predicting", leave=False, disable=hidden())):
        with torch.autocast(device.type, **amp_settings(amp)):
            out = net(datasets.normalise(images.to(device, non_blocking=True), mean, std))
        if logits is None:
            logits = torch.zeros(count, out.shape[1], device=device)
        logits[rows.start:rows.stop] = out.float()
    if ranks()[1] > 1:
        width = from_rank_0(lambda: logits.shape[1])
        logits = torch.zeros(count, width, device=device) if logits is None else logits
        dist.all_reduce(logits)
    return logits.cpu()


def write_predictions(file, cells, logits):
    """Write path, label, prediction and every class's probability (softmax of logits [N, C]) as CSV."""
    probabilities = logits.double().softmax(1).numpy()
    with datasets.open_atomic(file, "w") as handle:
        rows = csv.writer(handle)
        rows.writerow(["path", "label", "prediction"] + [f"p_{label}" for label in cells.classes])
        for path, target, p in zip(cells.paths, cells.targets, probabilities):
            rows.writerow([path, cells.classes[target], cells.classes[p.argmax()]] + [f"{v:.7g}" for v in p])


# ---------------------------------------------------------------- training
def train_epoch(net, batches, count, optimizer, scaler, mean, std, device, amp, layout):
    """Train on count batches; returns their losses, float32 [count] on device: nothing is read back inside the loop."""
    net.train()
    losses = torch.zeros(count, device=device)
    for step, (images, labels) in enumerate(batches):
        images = images.to(device, non_blocking=True).contiguous(memory_format=layout)
        with torch.autocast(device.type, **amp_settings(amp)):
            loss = cross_entropy(net(datasets.normalise(images, mean, std)), labels.to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses[step] = loss.detach()
    return losses


def fit(folder, net, train, val, *, lr, epochs=75, batch_size=32, seed=0, fold=0, image_size=224, mean, std, crop=True,
        workers=0, device="cpu", amp="off", memory_format="channels_last", compile=False, stop_lr=0.0, info=None):
    """Train net on train, choose the epoch on val (both Cells); returns the history, a list of dicts of log.csv's columns.

    Leaves log.csv, best.pt (first epoch of highest validation accuracy) and last.pt in folder and goes on from last.pt; net itself
    ends with the last epoch's weights. batch_size is the global one, mean and std are those that images are normalised with. info: what
    best.pt shall say besides; models.load_checkpoint needs its model and init. SystemExit if a loss is not finite (sections 2.2, 2.3).
    """
    folder, device, layout, (rank, number) = pathlib.Path(folder), torch.device(device), LAYOUTS[memory_format], ranks()
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    net.to(device, memory_format=layout)
    if number > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=MOMENTUM, fused=True)
    for parameter in net.parameters() if amp == "fp16" else ():  # left uninitialised where the scaler skips the first step
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    history = resume(folder, net, optimizer, scheduler, scaler)
    if history and history[0]["lr"] != lr:
        raise SystemExit(f"{folder}: begun at rate {history[0]['lr']}, not {lr}; repeat the old one, or start anew in another folder")
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, fold, rank, number)
    batches = datasets.loader(datasets.Batches(train, image_size, seed, fold, crop), order, workers, device.type == "cuda")
    val_batches = evaluation_loader(val, image_size, EVALUATION_BATCH, workers, device)
    parallel = torch.nn.parallel.DistributedDataParallel(net) if number > 1 else net
    if compile:  # CUDA graphs on one GPU alone: PyTorch's do not go with DistributedDataParallel
        torch.compiler.reset()
        parallel = torch.compile(parallel, mode="reduce-overhead" if device.type == "cuda" and number == 1 else None)
    about = dict(info or {}, classes=train.classes, mean=mean.tolist(), std=std.tolist(), image_size=image_size, fold=fold,
                 train_counts=np.bincount(train.targets, minlength=len(train.classes)).tolist())
    with concurrent.futures.ThreadPoolExecutor(1) as writer:  # writes one epoch's checkpoint while the next one trains
        saving = None
        while len(history) < epochs and not (history and optimizer.param_groups[0]["lr"] < stop_lr * lr):
            order.epoch, start = len(history) + 1, time.perf_counter()
            row = {"epoch": order.epoch, "lr": optimizer.param_groups[0]["lr"]}
            steps = iter(batches)
            seed_all(seed, fold, order.epoch, rank)  # dropout; after iter(), which draws from the generator, too
            steps = watched(steps, len(batches), order.epoch, epochs, batch_size)
            losses = train_epoch(parallel, steps, len(batches), optimizer, scaler, mean, std, device, amp, layout)
            if number > 1:
                dist.all_reduce(losses)
                for buffer in net.buffers():
                    dist.broadcast(buffer, src=0)
            losses = (losses / number).cpu()
            row["images_per_second"] = len(batches) * batch_size / (time.perf_counter() - start)
            logits, targets = predict_batches(net, val_batches, len(val), mean, std, device, amp), torch.from_numpy(val.targets)
            row["train_loss"], row["val_loss"] = losses.mean().item(), cross_entropy(logits, targets).item()
            row["val_accuracy"] = (logits.argmax(1) == targets).double().mean().item()
            if saving:
                saving.result()
            check_finite(losses, row)
            scheduler.step(row["val_loss"])
            row["seconds"] = time.perf_counter() - start
            history.append({column: row[column] for column in COLUMNS})
            if rank == 0:
                saving = writer.submit(save, folder, *snapshot(net, optimizer, scheduler, scaler, about, history))
            print(f"epoch {row['epoch']}/{epochs}: rate {row['lr']:.2g}, training loss {row['train_loss']:.4f}, validation loss "
                  f"{row['val_loss']:.4f}, accuracy {row['val_accuracy']:.4f}, {row['images_per_second']:.0f} images/s", flush=True)
        if saving:
            saving.result()
    best = folder / f"best-{best_epoch(history)}.pt"
    if rank == 0 and best.exists():
        os.replace(best, folder / "best.pt")
    return history


def watched(steps, count, epoch, epochs, batch_size):
    """The steps with a bar, and after 50 of them a line on the time that the rest takes (the first 10 compile and warm up)."""
    for step, batch in enumerate(tqdm(steps, total=count, desc=f"epoch {epoch}/{epochs}", leave=False, disable=hidden())):
        yield batch
        if step in (9, 49) and count > 50 and epoch in (1, epochs) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == 9:
            start = time.perf_counter()
        if step == 49 and count > 50 and epoch in (1, epochs):
            rate = 40 * batch_size / (time.perf_counter() - start)
            hours = (epochs - epoch + 1) * count * batch_size / rate / 3600
            print(f"{rate:.0f} images/s: training of this run takes about {hours:.1f} h more, without validation", flush=True)


def best_epoch(history):
    """The first epoch of highest validation accuracy."""
    return max(history, key=lambda row: row["val_accuracy"])["epoch"]


def check_finite(losses, row):
    """End the run with one line if a training step's loss or the validation loss is NaN or infinite."""
    bad = torch.nonzero(~torch.isfinite(losses))
    if len(bad) or not np.isfinite(row["val_loss"]):
        where = f"training loss is {losses[bad[0, 0]]:.0f} in step {bad[0, 0] + 1}" if len(bad) else "validation loss is not finite"
        raise SystemExit(f"epoch {row['epoch']}: {where}, at rate {row['lr']:.3g}; the state of the epoch before is kept; start "
                         "anew in another --runs folder with a lower --lr or --amp off")


def snapshot(net, optimizer, scheduler, scaler, about, history):
    """Copies on the CPU of all that goes on, and of the checkpoint if this epoch is the best so far (else None)."""
    def host(tensor):
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    weights = net.state_dict()  # an OrderedDict with the modules' versions, which a few networks need to be loaded
    for key, value in weights.items():
        weights[key] = host(value)
    state = optimizer.state_dict()
    state["state"] = {i: {k: host(v) if torch.is_tensor(v) else v for k, v in s.items()} for i, s in state["state"].items()}
    last = {"history": history[:], "best": f"best-{best_epoch(history)}.pt", "net": weights, "optimizer": state,
            "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict()}
    row, best = history[-1], None
    if row["epoch"] == best_epoch(history):
        best = dict(about, state_dict=weights, epoch=row["epoch"], val_accuracy=row["val_accuracy"])
    return last, best


def save(folder, last, best):
    """Write an epoch's files in the order that survives a kill between any two: best, last, log; then older bests go."""
    if best:
        save_whole(folder / last["best"], best)
    save_whole(folder / "last.pt", last)
    tidy(folder, last)


def save_whole(file, content):
    """torch.save so that file appears whole or not at all; a full disk raises OSError."""
    try:
        with datasets.open_atomic(file) as handle:
            torch.save(content, handle)
    except RuntimeError as error:  # PyTorch's writer hides the reason
        raise OSError(f"writing failed, disk full? ({str(error).splitlines()[0][:120]})") from None


def tidy(folder, last):
    """log.csv as last.pt has it, and no best file but the one that it names."""
    with datasets.open_atomic(folder / "log.csv", "w") as handle:
        rows = csv.DictWriter(handle, COLUMNS)
        rows.writeheader()
        rows.writerows(last["history"])
    for file in folder.glob("best-*.pt"):
        if file.name != last["best"]:
            file.unlink()


def resume(folder, net, optimizer, scheduler, scaler):
    """Load last.pt into all that goes on, if there is one; returns the history so far."""
    file = folder / "last.pt"
    if not file.exists():
        return []
    last = models.read_file(file, f"remove {folder} to start anew")
    try:
        net.load_state_dict(last["net"])
        optimizer.load_state_dict(last["optimizer"])
        for parameter, state in optimizer.state.items():  # fused SGD pairs numbers by their place in memory: same layout needed
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        scheduler.load_state_dict(last["scheduler"])
        scaler.load_state_dict(last["scaler"])
    except Exception as error:  # whatever another program's file leads to
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        raise SystemExit(f"{file}: cannot go on from it ({why}); remove {folder} to start anew") from None
    if ranks()[0] == 0:
        tidy(folder, last)
    print(f"{folder}: going on after epoch {len(last['history'])}", flush=True)
    return last["history"]


# ---------------------------------------------------------------- range test
class Normalised(torch_lr_finder.TrainDataLoaderIter):
    """Batches for torch-lr-finder: moved to the device and normalised."""

    def __init__(self, batches, mean, std, device, layout):
        super().__init__(batches)
        self.prepare = lambda images: datasets.normalise(images.to(device).contiguous(memory_format=layout), mean, std)

    def inputs_labels_from_batch(self, batch):
        return self.prepare(batch[0]), batch[1]


def range_test(net, train, *, batch_size, seed, image_size, mean, std, crop, workers, device, amp, memory_format):
    """Learning-rate range test on a copy of net with fold 0's training Cells: (rates, smoothed losses), lists of up to 100."""
    net, layout = copy.deepcopy(net).to(device, memory_format=LAYOUTS[memory_format]), LAYOUTS[memory_format]
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, 0)
    order.epoch, order.batches = 0, RANGE_STEPS  # 100 batches however short the data set is
    batches = datasets.loader(datasets.Batches(train, image_size, seed, 0, crop), order, workers, device.type == "cuda")
    optimizer = torch.optim.SGD(net.parameters(), lr=RANGE_LOW, momentum=MOMENTUM)
    finder = torch_lr_finder.LRFinder(
        net, optimizer, torch.nn.CrossEntropyLoss(), device, amp_backend="torch", grad_scaler=torch.amp.GradScaler(
            device.type, enabled=amp == "fp16"), amp_config={"device_type": device.type, **amp_settings(amp)})
    seed_all(seed, 0, 0, 0)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())  # its progress bar
    with contextlib.redirect_stdout(io.StringIO()), quiet:
        finder.range_test(Normalised(batches, mean, std, device, layout), end_lr=RANGE_HIGH, num_iter=RANGE_STEPS,
                          smooth_f=RANGE_SMOOTHING)
    return finder.history["lr"], [float(loss) for loss in finder.history["loss"]]


def choose_lr(rates, losses):
    """The rate of steepest descent before the minimum of a range test's smoothed curve; None if it never descends.

    The library's smoothing starts from the first batch's loss alone, whose deviation fades so slowly that it often is
    the steepest descent: here it starts from the median of the first ten. The first 10 and last 5 points are dropped,
    and all from the first loss on that is not finite. The slope is taken over 10 steps, or 20, or 40: the first in which
    the steepest fall is more than 4 standard deviations of such a difference of smoothed noise; a fall over the whole
    curve of less than 6 standard deviations of the noise is none.
    """
    losses = np.asarray(losses, np.float64)
    losses = losses[:len(losses) if np.isfinite(losses).all() else np.argmin(np.isfinite(losses))]
    if len(losses) < 2 * (RANGE_DROP_FIRST + RANGE_DROP_LAST):
        return None
    keep = 1 - RANGE_SMOOTHING
    raw = np.append(losses[0], (losses[1:] - keep * losses[:-1]) / RANGE_SMOOTHING)
    smooth = [np.median(raw[:RANGE_DROP_FIRST])]
    for loss in raw:
        smooth.append(RANGE_SMOOTHING * loss + keep * smooth[-1])
    curve = np.array(smooth[1 + RANGE_DROP_FIRST:-RANGE_DROP_LAST])
    curve = curve[:curve.argmin() + 1]
    noise = np.diff(raw[:len(raw) // 2]).std() / 2**0.5 * (RANGE_SMOOTHING / (2 - RANGE_SMOOTHING)) ** 0.5
    for span in (10, 20, 40) if curve.max() - curve[-1] > 6 * noise else ():
        span = min(span, len(curve) - 1)
        fall = curve[:len(curve) - span] - curve[span:]
        if fall.max() > 4 * noise * (2 - 2 * keep**span) ** 0.5:
            return float(rates[RANGE_DROP_FIRST + int(fall.argmax()) + span // 2])
    return None


def measure_formats(net, device, amp, batch_size, image_size):
    """Images per second of a training step on a copy of net in both memory formats (CUDA), a dict."""
    speed = {}
    for name, layout in LAYOUTS.items():
        trial = copy.deepcopy(net).to(device, memory_format=layout).train()
        images = torch.randn(batch_size, 3, image_size, image_size, device=device).contiguous(memory_format=layout)
        for step in range(30):
            if step == 10:
                torch.cuda.synchronize(device)
                start = time.perf_counter()
            with torch.autocast(device.type, **amp_settings(amp)):
                loss = trial(images).float().square().mean()
            loss.backward()
        torch.cuda.synchronize(device)
        speed[name] = 20 * batch_size / (time.perf_counter() - start)
    return speed


def measured(folder, build, train, *, lr, memory_format, device, amp, batch_size, image_size, **options):
    """(rate, memory format) of a model and init: as given, or measured once and read from <folder>/measured.json ever after."""
    file = folder / "measured.json"
    with datasets.file_lock(folder / "measured.lock"):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        found = datasets.read_json(file) if file.exists() else {}
        if memory_format == "auto" and "memory_format" not in found:
            speed = measure_formats(build(0), device, amp, batch_size // ranks()[1], image_size) if device.type == "cuda" else {}
            contiguous = speed and speed["contiguous"] > 1.15 * speed["channels_last"]
            found.update(memory_format="contiguous" if contiguous else "channels_last", images_per_second=speed)
        memory_format = found["memory_format"] if memory_format == "auto" else memory_format
        if lr == "auto" and "lr" not in found:
            rates, losses = range_test(build(0), train, device=device, amp=amp, batch_size=batch_size, image_size=image_size,
                                       memory_format=memory_format, **options)
            found["lr"] = choose_lr(rates, losses)
            if found["lr"] is None:
                found.update(lr=RANGE_DEFAULT_LR, warning=f"the loss never descends in the range test: default rate {RANGE_DEFAULT_LR}")
            write_curve(folder, rates, losses, found["lr"])
        with datasets.open_atomic(file, "w") as handle:
            json.dump(found, handle, indent=1)
    if lr == "auto" and "warning" in found:
        print(f"{file}: {found['warning']}", file=sys.stderr)
    return (found["lr"] if lr == "auto" else float(lr)), memory_format


def write_curve(folder, rates, losses, lr):
    """lr_range.csv and lr_range.png of a range test, the chosen rate marked."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with datasets.open_atomic(folder / "lr_range.csv", "w") as handle:
        csv.writer(handle).writerows([("lr", "smoothed_loss"), *zip(rates, losses)])
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(rates, losses)
    axes.axvline(lr, color="tab:red", linestyle="--", label=f"chosen: {lr:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)",
             title=f"Range test, {folder.parent.name}, {folder.name}")
    axes.legend()
    with datasets.open_atomic(folder / "lr_range.png") as handle:
        figure.savefig(handle, dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------- one run
@contextlib.contextmanager
def lock(folder):
    """Hold the run's lock, or yield False if another process does. lockf: data workers don't inherit it; never unlinked."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def initial_weights(runs, model, init, weights):
    """What build_model starts from for an init: None, ImageNet weights' name, or the path of a finished pre-training's best.pt."""
    if "=" in init:
        name, file = init.split("=", 1)
        if not pathlib.Path(file).is_file():
            raise SystemExit(f"--init {init}: {file!r} is no file; {models.OURS}")
        return os.path.abspath(file)
    if init in ("random", "imagenet"):
        return None if init == "random" else weights
    folder = pathlib.Path(runs) / "pretrain" / model / init
    if not (folder / "predictions.csv").exists():
        raise SystemExit(f"{folder}: no finished pre-training there; first python pretrain.py --model {model} --init {init} --runs {runs}")
    return os.path.abspath(folder / "best.pt")  # a path of any name is told from the name of ImageNet weights


def refuse_others(folder, same):
    """SystemExit if a run was begun with other settings than same (dict), by its config.json."""
    before = datasets.read_json(folder / "config.json") if (folder / "config.json").exists() else same
    differ = [f"{key} {before.get(key)} before, {value} now" for key, value in same.items() if before.get(key) != value]
    if differ and any(folder.glob("*.pt")):
        raise SystemExit(f"{folder}: begun with other settings ({'; '.join(differ)}); repeat the old ones, or start anew: remove that folder "
                         "or name another with --runs")


def finished(folder, same):
    """Has the run left predictions.csv? SystemExit if it did so with other settings than same."""
    if not (folder / "predictions.csv").exists():
        return False
    refuse_others(folder, same)
    (folder / "last.pt").unlink(missing_ok=True)
    return True


def versions():
    """Versions of the packages that results depend on, and the git commit if there is one."""
    here = pathlib.Path(__file__).parent
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        commit = subprocess.run(["git", "-C", here, "rev-parse", "--verify", "-q", "HEAD"], capture_output=True, text=True,
                                check=False).stdout.strip()
    names = ("torch", "torchvision", "numpy", "opencv-python-headless", "scikit-learn", "torch-lr-finder")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": sys.version.split()[0], **found, "commit": commit or None}


def hash_file(file):
    """SHA-256 of a file, or None for no file."""
    if file is None:
        return None
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def run(folder, measured_folder, cells, info, parts, *, model, init, weights, fold, seed, lr, batch_size, epochs, image_size,
        stop_lr, amp, memory_format, device, workers, compile, crop=True):
    """One fine-tuning or pre-training from the beginning to predictions.csv; returns the exit status.

    cells: all readable images; parts: str [N, folds] of 'train', 'val', 'test'; without test images val's are predicted.
    """
    rank, number = ranks()
    split = hashlib.sha256("\0".join(map("\1".join, sorted(zip(cells.paths, parts[:, fold])))).encode(errors="surrogateescape"))
    same = {"model": model, "init": init, "data": info["fingerprint"], "split": split.hexdigest(), "fold": fold, "seed": seed, "epochs": epochs,
            "batch_size": batch_size, "image_size": image_size, "stop_lr": stop_lr} | ({} if lr == "auto" else {"lr": lr})
    with contextlib.ExitStack() as stack:
        if not from_rank_0(lambda: stack.enter_context(lock(folder))):
            print(f"{folder}: busy, another process works on it", file=sys.stderr)
            return BUSY
        if from_rank_0(lambda: finished(folder, same)):
            print(f"{folder}: finished, nothing to do")
            return 0
        for leftover in folder.glob(".*.tmp") if rank == 0 else ():
            leftover.unlink()
        common = {"seed": seed, "image_size": image_size, "mean": info["mean"], "std": info["std"], "crop": crop, "workers": workers,
                  "device": device, "amp": amp, "batch_size": batch_size}

        train, val, test = (cells.subset(parts[:, fold] == part) for part in ("train", "val", "test"))
        if not len(train) or not len(val):
            raise SystemExit(f"{cells.root}: {len(train)} images to train on and {len(val)} to validate with in fold {fold}; it takes "
                             "some of both: more images, or another split.csv")

        def build(of_fold):
            seed_all(seed, of_fold)
            return models.build_model(model, len(cells.classes), weights, image_size)

        def prepare():
            if number > 1 and weights:
                build(fold)  # fetches ImageNet's file before the other ranks look for it
            if lr == "auto" or memory_format == "auto":
                return measured(measured_folder, build, cells.subset(parts[:, 0] == "train"), lr=lr, memory_format=memory_format, **common)
            return float(lr), memory_format
        rate, layout = from_rank_0(prepare)
        net = build(fold)
        file = models.imagenet_file(model, weights)[1] if models.is_imagenet(weights) else weights
        same |= {"weights": hash_file(file), "lr": rate, "amp": amp, "memory_format": layout}
        also = {"lr_argument": lr, "device": str(device), "workers": workers, "ranks": number, "compile": compile, "versions": versions(),
                "train_images": len(train), "val_images": len(val), "test_images": len(test), "left_out": info["unreadable"],
                "weights_from": str(file), "root": os.path.abspath(cells.root), "command": sys.argv}
        if rank == 0:
            refuse_others(folder, same)
            with datasets.open_atomic(folder / "config.json", "w") as handle:
                json.dump(same | also, handle, indent=1)
        fit(folder, net, train, val, lr=rate, epochs=epochs, fold=fold, compile=compile, stop_lr=stop_lr, memory_format=layout,
            info={"model": model, "init": init}, **common)
        if number > 1:
            dist.barrier()
        publish(folder, net, val, test, **{key: common[key] for key in ("image_size", "mean", "std", "workers", "device", "amp")})
    return 0


def publish(folder, net, val, test, **how):
    """Write the best epoch's predictions, those of the test images (without any: val's) last, since they say that the run is finished."""
    best = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
    net.load_state_dict(best["state_dict"])
    for file, data in (("val_predictions.csv", val), ("predictions.csv", test)) if len(test) else (("predictions.csv", val),):
        logits = predict(net, data, **how)
        if ranks()[0] == 0:
            write_predictions(folder / file, data, logits)
    if ranks()[0] == 0:
        (folder / "last.pt").unlink(missing_ok=True)
        accuracy = float((logits.argmax(1).numpy() == data.targets).mean())
        print(f"{folder}: finished; epoch {best['epoch']} was best, accuracy {accuracy:.4f} on {len(data)} images", flush=True)


# ---------------------------------------------------------------- command line
def add_options(parser):
    """The options that train.py and pretrain.py share."""
    parser.add_argument("--runs", default="runs", help="folder of results; one for each target data set")
    parser.add_argument("--epochs", type=COUNT, default=75)
    parser.add_argument("--batch-size", type=COUNT, default=32, help="global: shared by the ranks of torchrun")
    parser.add_argument("--lr", type=RATE, default="auto", help="initial rate; auto: range test")
    parser.add_argument("--image-size", type=COUNT, default=224, help="pixels")
    parser.add_argument("--workers", type=WORKERS, default="auto", help="data workers of each rank")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", choices=["auto", *AMP_TYPES], default="auto", help="mixed precision")
    parser.add_argument("--memory-format", choices=["auto", *LAYOUTS], default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile, with CUDA graphs on CUDA")
    parser.add_argument("--stop-lr", type=SHARE, default=0.0, help="end a run when its rate is below this fraction of the initial one")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--weights", default="imagenet", help="ImageNet weights by torchvision's name, e.g. IMAGENET1K_V1")
    parser.add_argument("--model", required=True, help="resnet152, vit_l_32, ... or any classification model of torchvision")


def checked(kind, fits, what):
    """An argument's type: kind (int, float) of its text where that fits, else argparse says that it is not `what`."""
    def read(text):
        if text == "auto" and "auto" in what:
            return text
        with contextlib.suppress(ValueError):
            if fits(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return read


COUNT = checked(int, lambda n: n >= 1, "a whole number of at least 1")
WORKERS = checked(int, lambda n: n >= 0, "auto or a whole number of at least 0")
SEED = checked(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")
SHARE = checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
RATE = checked(float, lambda x: 0 < x < float("inf"), "auto or a number above 0")


def options(args, parser):
    """Check what the scripts share and return run's keyword arguments; joins the ranks."""
    try:
        models.check_name(args.model, args.image_size, args.weights if args.init.startswith("imagenet") else None)
        device = join_ranks(choose_device(args.device))
    except ValueError as error:
        parser.error(str(error))
    if args.batch_size % ranks()[1]:
        parser.error(f"--batch-size {args.batch_size} cannot be shared equally by {ranks()[1]} ranks")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    return {"seed": args.seed, "lr": args.lr, "batch_size": args.batch_size, "epochs": args.epochs, "image_size": args.image_size,
            "stop_lr": args.stop_lr, "amp": choose_amp(device, args.amp), "device": device, "compile": args.compile,
            "workers": choose_workers(device, args.workers), "memory_format": args.memory_format}


def open_checked(data, runs):
    """(readable images as Cells, info of the pass over them): rank 0 checks first, and says what is left out."""
    cells = datasets.open_dataset(data)
    info = from_rank_0(lambda: datasets.check_dataset(cells, runs))
    unreadable = [path for path, _ in info["unreadable"]]
    print(f"{cells.root}: {len(cells)} images in {len(cells.classes)} classes ({', '.join(cells.classes)})", flush=True)
    lines = info["notes"] + [f"{path} cannot be read ({why}): left out" for path, why in info["unreadable"][:5]]
    for note in lines if ranks()[0] == 0 else ():
        print(f"  {note}", file=sys.stderr)
    if len(unreadable) > 5 and ranks()[0] == 0:
        print(f"  and {len(unreadable) - 5} unreadable images more, see {runs}/data/{cells.name}.json", file=sys.stderr)
    return cells.subset(~np.isin(cells.paths, unreadable)), info


def open_split(file, cells, unreadable):
    """(cells of the split, their parts: str [N, folds]) by the split at file, which is made with 5 folds if there is none."""
    with datasets.file_lock(file.with_name(".split.lock")):
        if not file.exists():
            splits.write_splits(file, cells.paths, [cells.classes[t] for t in cells.targets], splits.make_splits(cells.targets, groups=cells.groups))
            print(f"{file}: new stratified split into 5 folds")
    paths, labels, parts = splits.read_splits(file)
    place = {path: i for i, path in enumerate(paths)}
    gone = sorted(set(paths) - set(cells.paths) - unreadable)
    if gone:
        raise SystemExit(f"{file}: {len(gone)} of its {len(paths)} images are not in {cells.root}, e.g. {gone[0]}; put them back, or "
                         "start anew with another --runs folder")
    rows = np.array([place.get(path, -1) for path in cells.paths])
    if (rows < 0).any():
        print(f"{file}: {(rows < 0).sum()} images of {cells.root} are not in it, e.g. {cells.paths[rows < 0][0]}: left out",
              file=sys.stderr)
    cells, rows = cells.subset(rows >= 0), rows[rows >= 0]
    wrong = [path for path, target, row in zip(cells.paths, cells.targets, rows) if labels[row] != cells.classes[target]]
    if wrong:
        raise SystemExit(f"{file}: {len(wrong)} labels differ from the class folders, e.g. of {wrong[0]}; correct it or remove it")
    return cells, parts[rows]


def stop(signum, frame):
    """Ctrl-C and SIGTERM: end at once with one line; what is being written is finished first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, of which Python complains if one more is on its way
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises for data workers that got the signal, too
    stop.status = 128 + signum
    print(f"\nstopped by {signal.Signals(signum).name}; the same command goes on after the last finished epoch",
          file=sys.__stderr__, flush=True)  # sys.stderr may be redirected by the range test
    raise SystemExit(stop.status)


def run_main(main):
    """Run main so that signals, bad data and failing hardware end in one line, not in a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # folders may have any name
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return main()
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(f"{str(error).splitlines()[0]} Lower --batch-size or --image-size, or run fewer jobs on this GPU; under torchrun "
                         "the range test has the whole batch on one GPU, which --lr RATE does without") from None
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error).strip()
        if "DataLoader" in text:  # a data worker died, or gave nothing for so long that it counts as hanging
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            time.sleep(0.5)  # a signal to the whole process group kills the workers first
            if hasattr(stop, "status"):
                raise SystemExit(stop.status) from None
            advice = "put that file back, and " if any(word in text for word in datasets.UNREADABLE) else ""
            print(f"{text.splitlines()[-1]}; {advice}the same command goes on after the last finished epoch", file=sys.stderr, flush=True)
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(1)  # an ordinary exit would wait for a worker that hangs
        if any(word in text for word in TOO_SMALL):
            raise SystemExit(f"{text.splitlines()[0]}: --image-size or --batch-size is too small for this network") from None
        if isinstance(error, (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)):
            raise SystemExit(f"{error.filename}: {error.strerror}; see to it, or name another folder with --runs") from None
        if isinstance(error, ValueError) and any(word in text for word in datasets.UNREADABLE):
            raise SystemExit(f"{text}; put that file back, and the same command goes on after the last finished epoch") from None
        known = ("CUDA error", "cuDNN error", "NCCL", "Gloo", "gloo", "allocate memory")
        if isinstance(error, OSError) or any(word in text for word in known):
            why = text.splitlines()[-1 if "NCCL" in text else 0]  # CUDA's messages begin with what happened, NCCL's end with it
            raise SystemExit(f"{why}; the same command goes on after the last finished epoch") from None
        raise
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--init", required=True,
                        help=f"{', '.join(models.INITS)}, another pre-training's name, or NAME=PATH of a checkpoint")
    parser.add_argument("--fold", type=int, nargs="+", help="folds to train, from 0 (default: all)")
    parser.add_argument("--data", default="data/bm", help="folder of the data set")
    args = parser.parse_args()
    runs, init = pathlib.Path(args.runs), args.init.split("=", 1)[0]
    if args.init not in models.INITS and "=" not in args.init and not (runs / "pretrain" / args.model / args.init).is_dir():
        parser.error(f"--init {args.init}: not one of {', '.join(models.INITS)}, and no pre-training of that name in "
                     f"{runs}/pretrain/{args.model}")
    if "=" in args.init and (not re.fullmatch(r"\w[\w.+-]*", init) or init in ("random", "imagenet")):
        parser.error(f"--init {args.init}: NAME=PATH takes a name of letters, digits, . + - that is not random or imagenet")
    settings = options(args, parser)
    weights, status = initial_weights(runs, args.model, args.init, args.weights), 0
    cells, info = open_checked(args.data, runs)
    before = pathlib.Path(weights).with_name("config.json") if weights and os.path.isabs(weights) else None
    if before and before.exists() and datasets.read_json(before).get("data") == info["fingerprint"]:
        raise SystemExit(f"{weights}: was trained on the very images of {cells.root}, those to be tested among them; start from other weights")
    cells, parts = from_rank_0(lambda: open_split(runs / "split.csv", cells, {path for path, _ in info["unreadable"]}))
    folds = range(parts.shape[1]) if args.fold is None else args.fold
    if not all(0 <= fold < parts.shape[1] for fold in folds):
        parser.error(f"--fold {' '.join(map(str, folds))}: {runs}/split.csv has folds 0 to {parts.shape[1] - 1}")
    for fold in folds:
        folder = runs / "train" / args.model / init
        status = run(folder / f"fold{fold}", folder, cells, info, parts, model=args.model, init=init, weights=weights, fold=fold,
                     **settings) or status
    return status


if __name__ == "__main__":
    sys.exit(run_main(main))
