"""Fine-tune a network on bone marrow cells, or on any folder of class folders, by the paper's protocol.

    python train.py --model vit_l_32 --init imagenet     # all folds of data/bm; resumes where it stopped
    python train.py --model resnet18 --init random --fold 0 --data data/mine --epochs 25 --image-size 96
    torchrun --standalone --nproc_per_node=4 train.py --model resnet152 --init imagenet+cd    # on four GPUs

Writes runs/train/<model>/<name>/fold<k>/ (<name>: --name, or the init). Kill it at any time: the same command
resumes after the last complete epoch, on a CPU bit for bit. Exit status: 0 done, 1 bad data or failed
training, 2 bad arguments, 75 another process is working on the run.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import torch

import datasets
import engine
import learning_rate
import models
import splits
from engine import from_rank_0, ranks

BUSY = 75  # exit status EX_TEMPFAIL


# ---------------------------------------------------------------- options
def add_options(parser):
    """The options that train.py and pretrain.py share."""
    add = parser.add_argument
    add("--model", required=True, help="resnet152, vit_l_32, ... or any of torchvision or timm")
    add("--runs", type=pathlib.Path, default="runs", help="results of one target data set")
    add("--epochs", type=int, default=75)
    add("--batch-size", type=int, default=32, help="shared by the ranks of torchrun")
    add("--lr", default="auto", help="initial learning rate (auto: by range test and trial)")
    add("--image-size", type=int, default=224, help="pixels")
    add("--seed", type=int, default=0)
    add("--weights", default="imagenet", help="ImageNet weights by the library's name")
    add("--stop-lr", type=float, default=0.0, help="stop below this share of the first rate")
    add("--optimizer", choices=engine.OPTIMIZERS, default="sgd")
    add("--schedule", choices=engine.SCHEDULES, default="plateau", help="of the learning rate")
    add("--smoothing", type=float, default=0.0, help="label smoothing of the training loss, e.g. 0.1")
    add("--colour", type=float, default=0.0, help="jitter of the training images' colours, e.g. 0.1")
    add("--freeze", action="store_true", help="train the new last layer alone (linear probing)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--workers", default="auto", help="data loading processes (of each rank)")
    add("--amp", choices=["auto", *engine.AMP_DTYPES], default="auto", help="precision (off on CUDA: TF32)")
    add("--memory-format", choices=["auto", *engine.LAYOUTS], default="auto")
    add("--compile", action="store_true", help="torch.compile, with CUDA graphs on CUDA")


def run_options(args, parser):
    """Check the shared options (parser.error for an impossible value); returns run's keyword arguments."""

    def check(name, valid, need):
        if not valid:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {need}")

    for name, least in (("epochs", 1), ("batch_size", 1), ("image_size", 1), ("seed", 0)):
        check(name, getattr(args, name) >= least, f"at least {least}")
    check("stop_lr", 0 <= args.stop_lr <= 1, "from 0 to 1")
    check("stop_lr", args.schedule == "plateau" or not args.stop_lr, "0 unless the schedule is plateau")
    check("smoothing", 0 <= args.smoothing < 1, "from 0 to below 1")
    check("colour", 0 <= args.colour <= 0.5, "from 0 to 0.5")
    check("workers", args.workers == "auto" or args.workers.isdecimal(), "auto or a whole number")
    if args.lr != "auto":
        with contextlib.suppress(ValueError):
            args.lr = float(args.lr)
        check("lr", isinstance(args.lr, float) and 0 < args.lr < math.inf, "auto or a number above 0")
    try:
        weights = args.weights if args.init.startswith("imagenet") else None
        models.check_name(args.model, weights)
        device = engine.join_ranks(choose_device(args.device))
    except ValueError as error:
        parser.error(str(error))
    check("batch_size", args.batch_size % ranks()[1] == 0, f"a multiple of the {ranks()[1]} ranks")
    try:
        models.check_forward(args.model, args.image_size, args.batch_size // ranks()[1])
    except ValueError as error:
        parser.error(str(error))
    if args.compile and ranks()[1] > 1:
        parser.error("--compile: not together with torchrun")
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True
    names = "model lr seed batch_size epochs image_size stop_lr optimizer schedule smoothing colour freeze "
    names += "memory_format compile"
    workers = choose_workers(device) if args.workers == "auto" else int(args.workers)
    chosen = {"device": device, "amp": choose_amp(device, args.amp), "workers": workers}
    return {name: getattr(args, name) for name in names.split()} | chosen


def choose_device(device="auto"):
    """torch.device of auto (CUDA, or else the CPU), cpu, cuda, cuda:1, ...; ValueError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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


def choose_workers(device):
    """Data loading processes: the cores, shared by run_all.sh's jobs (CELLS_JOBS) and torchrun's ranks."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE") or 1) * int(os.environ.get("CELLS_JOBS") or 1)
    return max(1, min(16, cores - 1)) if device.type == "cuda" else min(1, cores // 2)


# ---------------------------------------------------------------- one run
def check_settings(folder, settings):
    """What the run in the folder was begun with (its config.json), {} if nothing was; SystemExit if other."""
    if not any(folder.glob("*.pt")) or not (folder / "config.json").exists():
        return {}
    before = datasets.read_json(folder / "config.json")
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        changed = [f"{key} was {before.get(key)!s:.20}, is now {settings[key]!s:.20}" for key in changed]
        advice = "use those, remove the folder, or name another with --runs (and copy split.csv there)"
        raise SystemExit(f"{folder}: begun with other settings ({'; '.join(changed)}); {advice}")
    return before


def digest(content):
    """SHA-256 in hexadecimal of a text, or of a file (a Path)."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
    with open(content, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def versions():
    """What the results depend on besides the settings."""
    commit = None
    with contextlib.suppress(OSError):  # no git on this machine
        git = ["git", "-C", pathlib.Path(__file__).parent, "rev-parse", "--verify", "-q", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    packages = {"torch": torch, "torchvision": models.torchvision, "numpy": np}
    packages = {name: package.__version__ for name, package in packages.items()}
    return packages | {"python": sys.version.split()[0], "commit": commit}


def run(folder, shared, cells, info, parts, *, model, init, weights, fold, lr, freeze, **options):
    """One fine-tuning or pre-training from its initial weights to predictions.csv; returns the exit status.

    cells: all readable images; parts: str [N, folds], train, val or test. Without test images those of val
    are predicted. shared: the folder of the rate of all folds. options: further ones of fit.
    """
    train, val, test = (cells.subset(parts[:, fold] == part) for part in ("train", "val", "test"))
    if not len(train) or not len(val):
        what = f"{len(train)} images to train on and {len(val)} to validate with in fold {fold}"
        raise SystemExit(f"{cells.root}: {what}, which needs both: more images, or another split.csv")
    options = {"crop": True} | options
    settings = {"model": model, "init": init, "data": info["fingerprint"], "fold": fold, "freeze": freeze}
    settings["split"] = digest("\n".join(map(",".join, sorted(zip(cells.paths, parts[:, fold])))))
    guarded = options.keys() - {"device", "workers", "compile", "amp", "memory_format"}  # the last two later
    settings |= {key: options[key] for key in sorted(guarded)}
    file = models.imagenet_file(model, weights)[1] if models.is_imagenet(weights) else weights

    def make_net(number):
        engine.seed_all(engine.WEIGHTS, options["seed"], number)
        net = models.build_model(model, len(cells.classes), weights, options["image_size"])
        return models.freeze(net) if freeze else net

    def find_rate():
        return before.get("lr") or measure_lr(shared, make_net, cells, parts, settings, options)

    lock = datasets.run_lock(folder) if ranks()[0] == 0 else contextlib.nullcontext()
    with lock as ours:
        if not from_rank_0(lambda: ours):
            print(f"{folder}: busy, another process is working on it", file=sys.stderr)
            return BUSY
        if file is None or os.path.exists(file):  # ImageNet's may still have to be fetched
            settings["weights"] = file and digest(pathlib.Path(file))
        before = check_settings(folder, settings if lr == "auto" else settings | {"lr": lr})
        if from_rank_0(lambda: (folder / "predictions.csv").exists()):
            (folder / "last.pt").unlink(missing_ok=True)
            print(f"{folder}: finished, nothing to do")
            return 0
        net = make_net(fold)
        options |= {"mean": info["mean"], "std": info["std"]}
        options["memory_format"] = choose_memory_format(net, options)
        if "weights" not in settings:
            settings["weights"] = digest(pathlib.Path(file))
        settings |= {key: options[key] for key in ("amp", "memory_format")}
        settings["lr"] = lr = from_rank_0(find_rate) if lr == "auto" else lr
        check_settings(folder, settings)
        if ranks()[0] == 0:
            record = {"name": shared.name, "root": os.path.abspath(cells.root), "source": cells.source}
            record |= {"train_images": len(train), "val_images": len(val), "test_images": len(test)}
            record["groups"] = None if cells.groups is None else len(set(cells.groups))
            record["left_out"] = info["unreadable"]
            with datasets.open_atomic(folder / "config.json", "w") as handle:
                json.dump(settings | record | run_record(options), handle, indent=1)
        engine.fit(folder, net, train, val, lr=lr, fold=fold, info={"model": model, "init": init}, **options)
        publish(folder, net, val, test, options)
    return 0


def choose_memory_format(net, options):
    """channels_last, but for grouped convolutions on CUDA, which are slow in it on some GPUs."""
    if options["memory_format"] != "auto":
        return options["memory_format"]
    grouped = any(getattr(module, "groups", 1) > 1 for module in net.modules())
    return "contiguous" if grouped and options["device"].type == "cuda" else "channels_last"


def measure_lr(folder, make_net, cells, parts, settings, options):
    """find_lr's rate for a run's settings and options (dicts), from fold 0 of parts."""
    train, val = (cells.subset(parts[:, 0] == part) for part in ("train", "val"))
    others = ("stop_lr", "schedule", "compile")
    options = {key: options[key] for key in options if key not in others}
    origin = {key: settings[key] for key in ("data", "weights", "freeze")}
    return learning_rate.find_lr(folder, make_net, train, val, origin=origin, **options)


def run_record(options):
    """What config.json keeps of a run besides its settings: recorded, not guarded."""
    device = options["device"]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    record = {key: options[key] for key in ("workers", "compile")}
    record |= {"device": str(device), "gpu": gpu, "ranks": ranks()[1]}
    return record | {"versions": versions(), "command": sys.argv}


def publish(folder, net, val, test, options):
    """Write the best epoch's predictions, last predictions.csv, since it says that the run is finished."""
    best = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
    net.load_state_dict(best["state_dict"])
    names = "mean std image_size workers device amp memory_format".split()
    options = {name: options[name] for name in names}
    tables = [("val_predictions.csv", val), ("predictions.csv", test)]
    for name, cells in tables if len(test) else [("predictions.csv", val)]:
        logits = engine.predict(net, cells, **options)
        engine.write_predictions(folder / name, cells, logits)
    if ranks()[0] == 0:
        (folder / "last.pt").unlink(missing_ok=True)
    epoch, accuracy = best["epoch"], (logits.argmax(1).numpy() == cells.targets).mean()
    print(f"{folder}: finished; accuracy of epoch {epoch} {accuracy:.4f} on {len(cells)} images")


# ---------------------------------------------------------------- main
def run_main(main):
    """Run a script's main and exit with its status; a full memory and an OSError end in one line.

    Any kill resumes exactly, so that signals end the process at once.
    """
    if not hasattr(sys.stdout, "reconfigure"):
        sys.exit("in a notebook, write !python in place of %run: these scripts end the process they run in")
    sys.stdout.reconfigure(errors="backslashreplace")  # folders may have any name
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for run_all.sh's jobs, which it ends itself
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = main()
    except BrokenPipeError:  # nobody reads the output any more
        os._exit(128 + signal.SIGPIPE)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "out of memory" not in str(error):
            raise
        advice = "lower --batch-size or --image-size, run fewer jobs on this GPU, or give torchrun --lr RATE"
        sys.exit(f"out of memory ({str(error).splitlines()[0]}): {advice}")
    except OSError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"{error.filename}: {error.strerror}" if error.filename else lines[-1]
        sys.exit(f"{what}; put it right, or name another --runs, and the same command resumes")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    inits = ", ".join(models.INITS)
    parser.add_argument("--init", required=True, help=f"{inits}, others, or NAME=PATH")
    parser.add_argument("--name", help="name of the row in Table 4 and of its folder (default: the init)")
    parser.add_argument("--fold", type=int, nargs="+", help="folds to train, from 0 (default: all)")
    parser.add_argument("--data", default="data/bm", help="folder, pattern or table of the data set")
    args = parser.parse_args()
    init, own = args.init.split("=")[0], args.runs / "pretrain" / args.model
    name = args.name or init
    if not re.fullmatch(r"\w[\w.+-]*", name) or ("=" in args.init and init in ("random", "imagenet")):
        rule = "a NAME (of NAME=PATH too) has letters, digits and .+- alone and is not random or imagenet"
        parser.error(f"--init {args.init}, --name {name}: {rule}")
    if "=" not in args.init and init not in models.INITS and not (own / init).is_dir():
        parser.error(f"--init {init}: not one of {inits}, and not in {own}")
    options = run_options(args, parser)
    weights = models.initial_weights(args.runs, args.model, args.init, args.weights)
    cells, info = from_rank_0(lambda: datasets.open_checked(args.data, args.runs))
    if weights and os.path.isabs(weights):
        config = pathlib.Path(weights).with_name("config.json")
        if config.exists() and datasets.read_json(config).get("data") == info["fingerprint"]:
            what = f"was trained on the very images of {cells.root}, those to be tested among them"
            raise SystemExit(f"{weights}: {what}; start from other weights")
    unreadable = [path for path, _ in info["unreadable"]]
    cells, parts = from_rank_0(lambda: splits.open_split(args.runs / "split.csv", cells, unreadable))
    folds = range(parts.shape[1]) if args.fold is None else args.fold
    if not all(0 <= fold < parts.shape[1] for fold in folds):
        wrong = " ".join(map(str, folds))
        parser.error(f"--fold {wrong}: split.csv has folds 0 to {parts.shape[1] - 1}")
    for kind, groups in splits.read_twins(args.runs, cells.name, cells.paths).items():
        if groups:
            print(f"test images that {kind} a training image, by fold: {splits.count_leaks(parts, groups)}")
    folder, status = args.runs / "train" / args.model / name, 0
    for fold in folds:
        options |= {"init": init, "weights": weights, "fold": fold}
        status |= run(folder / f"fold{fold}", folder, cells, info, parts, **options)
    return status


if __name__ == "__main__":
    run_main(main)
