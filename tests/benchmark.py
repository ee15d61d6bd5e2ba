"""How fast is it? One CSV row a measurement: what,ours,reference,unit,ratio (ratio above 1: ours is better).

    python tests/benchmark.py > speed.csv                              all rows but networks, on drawn cells
    python tests/benchmark.py --only "input pipeline" --data data/bm   one row, on your own images
    python tests/benchmark.py --only networks --device cuda            architectures, formats, --compile, jobs
    python tests/benchmark.py --only overlaps --full                   overlaps.py on 171,374 images, an hour

Medians of --rounds, both sides in turn. The reference is the usual way: torchvision's ImageFolder and PIL
transforms, an eager float32 loop with .item() in each step, csv.DictReader, scikit-learn. Progress on stderr.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn import metrics, model_selection
from torch.nn.functional import cross_entropy
from torchvision import transforms

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import datasets  # noqa: E402
import demo_data  # noqa: E402
import engine  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import overlap_data  # noqa: E402
import overlaps  # noqa: E402
import splits  # noqa: E402
import train  # noqa: E402

MEAN, STD = (0.5630, 0.4959, 0.7353), (0.2421, 0.2835, 0.1767)  # Table 2, BM
TABLE5 = ROOT / "paper" / "table5.csv"  # BM's classes and their numbers of images
IMAGES, PAIRS = 171374, 20000  # of BM; pairs planted among as many images


# ---------------------------------------------------------------- measuring
def in_turn(ours, reference, rounds):
    """Median seconds of both calls, made in turn, once to warm up and then `rounds` times."""
    seconds = [], []
    for turn in range(rounds + 1):
        for kept, call in zip(seconds, (ours, reference)):
            start = time.perf_counter()
            call()
            if turn:
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in seconds]


def rates(images, seconds):
    """A row's ours, reference, unit and ratio from the seconds that both sides take for so many images."""
    return images / seconds[0], images / seconds[1], "images/s", seconds[1] / seconds[0]


def costs(ours, reference, unit="s"):
    """The same for quantities of which less is better."""
    return ours, reference, unit, reference / ours


def say(text):
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def describe_machine():
    """Processor, cores, GPU and versions in one line."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, torchvision, cv2)]
    parts = [(names or [platform.processor()])[0], f"{len(os.sched_getaffinity(0))} cores", gpu]
    return ", ".join([*parts, f"Python {platform.python_version()}", *versions])


# ---------------------------------------------------------------- the usual way
def usual_transform(size, training):
    """Section 2.3's augmentation, or its resize, and normalisation by torchvision and PIL."""
    steps = [transforms.Resize((size, size))]
    if training:
        steps = [
            transforms.RandomResizedCrop(size, scale=(0.08, 1)),
            transforms.RandomRotation(180, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
        ]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def usual_loader(cells, args, weights=None):
    """DataLoader of batches of 32 over Cells as an ImageFolder; weights of the sampler, if for training."""
    data = torchvision.datasets.ImageFolder(cells.root, usual_transform(args.image_size, weights is not None))
    place = {os.path.relpath(file, cells.root): i for i, (file, _) in enumerate(data.samples)}
    data = torch.utils.data.Subset(data, [place[path] for path in cells.paths])
    sampler = None if weights is None else torch.utils.data.WeightedRandomSampler(weights, len(cells))
    return torch.utils.data.DataLoader(data, 32, sampler=sampler, num_workers=args.workers)


def usual_training(net, optimizer, batches, device):
    """An epoch as most repositories write it: eager, float32, .item() in each step."""
    net.train()
    total = correct = 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        out = net(images)
        loss = cross_entropy(out, labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
        correct += (out.argmax(1) == labels).sum().item()


def usual_evaluation(net, batches, device):
    """Loss and right answers of a plain evaluation loop."""
    net.eval()
    total = correct = 0
    with torch.no_grad():
        for images, labels in batches:
            out, labels = net(images.to(device)), labels.to(device)
            total += cross_entropy(out, labels).item()
            correct += (out.argmax(1) == labels).sum().item()


# ---------------------------------------------------------------- training and testing
def input_pipeline(cells, args):
    """Image files to augmented batches of 32 on one core; ours as uint8, as they go to the device."""
    indices = np.resize(np.random.default_rng(0).permutation(len(cells)), args.images)
    batches, transform = datasets.Batches(cells, args.image_size), usual_transform(args.image_size, True)

    def ours():
        for start in range(0, len(indices), 32):
            batches.__getitems__((1, start, indices[start : start + 32]))

    def usual():
        for start in range(0, len(indices), 32):
            files = [cells.root / str(cells.paths[i]) for i in indices[start : start + 32]]
            torch.stack([transform(Image.open(file).convert("RGB")) for file in files])

    yield "input pipeline", *rates(len(indices), in_turn(ours, usual, args.rounds))


def build(model, args, layout="contiguous", classes=21):
    """The network with the same weights every time."""
    engine.seed_all(0)
    net = models.build_model(model, classes, image_size=args.image_size)
    return net.to(args.device, memory_format=engine.LAYOUTS[layout])


def options(args):
    """What fit and predict are told alike."""
    names = ("image_size", "workers", "device", "amp")
    return {name: getattr(args, name) for name in names} | {"mean": MEAN, "std": STD}


def epoch_against_plain_loop(cells, args):
    """One epoch of fit (training, validation, checkpoint) and a plain loop on the same images."""
    count, val_count = 32 * args.steps, 8 * args.steps
    chosen = np.resize(np.random.default_rng(0).permutation(len(cells)), count + val_count)
    learn, val = cells.subset(chosen[:count]), cells.subset(chosen[count:])
    weights = 1 / np.bincount(learn.targets)[learn.targets]
    net, usual = (build(args.model, args, classes=len(cells.classes)) for _ in range(2))
    optimizer = torch.optim.SGD(usual.parameters(), lr=1e-3, momentum=0.9)
    settings = {"lr": 1e-3, "compile": args.compile, "memory_format": args.memory_format} | options(args)

    def ours():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            engine.fit(folder, net, learn, val, epochs=1, **settings)

    def reference():
        usual_training(usual, optimizer, usual_loader(learn, args, weights), args.device)
        usual_evaluation(usual, usual_loader(val, args), args.device)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(usual.state_dict(), f"{folder}/best.pt")

    yield "epoch against plain loop", *rates(count, in_turn(ours, reference, args.rounds))


def evaluation_against_plain_loop(cells, args):
    """predict, from files to logits, and a plain loop under no_grad."""
    some = cells.subset(np.resize(np.arange(len(cells)), 64 * args.steps))
    layouts = args.memory_format, "contiguous"
    net, usual = (build(args.model, args, layout, len(cells.classes)) for layout in layouts)
    settings = options(args) | {"memory_format": args.memory_format}
    seconds = in_turn(
        lambda: engine.predict(net, some, **settings),
        lambda: usual_evaluation(usual, usual_loader(some, args), args.device),
        args.rounds,
    )
    yield "evaluation against plain loop", *rates(len(some), seconds)


def wait(device):
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_steps(model, args, layout, compiled=False):
    """(ours, bare), of --steps steps of 32 images: train_epoch on pinned uint8 batches, as fit calls it; and
    forward, backward and optimiser alone on batches that lie normalised on the device, eager."""
    draw, shape = torch.Generator().manual_seed(0), (32, args.image_size, args.image_size, 3)
    batches = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw) for _ in range(args.steps)]
    labels, mean, std = torch.arange(32) % 21, *(torch.tensor(v, device=args.device) for v in (MEAN, STD))
    batches = [batch.permute(0, 3, 1, 2) for batch in batches]
    if args.device.type == "cuda":
        batches, labels = [batch.pin_memory() for batch in batches], labels.pin_memory()
    net = build(model, args, layout).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
    wrapped, form = net, engine.LAYOUTS[layout]
    if compiled:
        torch._dynamo.reset()
        wrapped = torch.compile(net, mode="reduce-overhead" if args.device.type == "cuda" else None)
    there = labels.to(args.device)

    def ours():
        pairs = ((batch, labels) for batch in batches)
        engine.train_epoch(wrapped, pairs, optimizer, scaler, mean, std, args.device, args.amp, form)
        wait(args.device)

    ready = [datasets.normalise(batch.to(args.device), mean, std) for batch in batches]
    ready = [batch.contiguous(memory_format=form) for batch in ready]

    def bare():
        for batch in ready:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(args.device.type, engine.AMP_DTYPES[args.amp], args.amp != "off"):
                loss = cross_entropy(net(batch), there)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        wait(args.device)

    return ours, bare


def step_against_bare_step(_, args):
    """A training step on uint8 batches in memory and the bare step: forward, backward, optimiser."""
    steps = make_steps(args.model, args, args.memory_format, args.compile)
    yield "step against bare step", *rates(32 * args.steps, in_turn(*steps, args.rounds))


def peak_memory(device, call):
    """Peak MB that a call allocates on the GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 2**20


def job(model, args, ready, results):
    """One of several processes that train side by side: its images/s once all are warm."""
    set_up(args)
    ours, _ = make_steps(model, args, args.memory_format)
    ours()
    ready.wait(600)
    start, images = time.perf_counter(), 0
    while time.perf_counter() < start + args.seconds:
        ours()
        images += 32 * args.steps
    results.put(images / (time.perf_counter() - start))


def networks(_, args):
    """Each of --networks: speed and peak memory against the bare step; up to three jobs on the device."""
    for model in args.networks:
        for layout in engine.LAYOUTS:
            for kind in ("eager", "compiled"):
                ours, bare = make_steps(model, args, layout, kind == "compiled")
                yield f"{model} {layout} {kind}", *rates(32 * args.steps, in_turn(ours, bare, args.rounds))
                if args.device.type == "cuda":
                    peaks = [peak_memory(args.device, call) for call in (ours, bare)]
                    yield f"{model} {layout} {kind} peak memory", *costs(*peaks, "MB")
                del ours, bare
        torch._dynamo.reset()  # CUDA graphs hold memory that the jobs may need
        torch.cuda.empty_cache()
        context, one = multiprocessing.get_context("spawn"), None
        for number in (1, 2, 3):
            ready, results = context.Barrier(number), context.Queue()
            jobs = [context.Process(target=job, args=(model, args, ready, results)) for _ in range(number)]
            for process in jobs:
                process.start()
            total = sum(results.get(timeout=900 + args.seconds) for _ in jobs)  # or one has died
            for process in jobs:
                process.join()
            one = one or total
            yield f"{model} {number} jobs side by side", total, one, "images/s", total / one


# ---------------------------------------------------------------- the study's size
def full_targets():
    """Classes and class numbers (int64 [171374]) of the BM data set, from the published Table 5."""
    with open(TABLE5, encoding="utf-8", newline="") as handle:
        counts = {row["class"]: int(row["images"]) for row in csv.DictReader(handle)}
    return list(counts), np.repeat(np.arange(len(counts)), list(counts.values()))


def write_study(runs):
    """Predictions of 125 runs on a fifth of 171,374 images each, with 21 probabilities; returns the files."""
    classes, targets = full_targets()
    paths = [f"{classes[t]}/{i // 1000:04d}/{classes[t]}_{i:06d}.jpg" for i, t in enumerate(targets)]
    parts = splits.make_splits(targets)
    splits.write_splits(runs / "split.csv", paths, [classes[t] for t in targets], parts)
    rows = [(model, init) for model in evaluate.MODELS for init in evaluate.INITS]
    rows = [row for row in rows if row[0] != "resnext50_32x4d" or row[1] == "random"]
    rng, files = np.random.default_rng(0), []
    for fold in range(5):
        tested = np.flatnonzero(parts[:, fold] == "test")
        logits = rng.normal(0, 1.5, (len(tested), len(classes)))
        logits[np.arange(len(tested)), targets[tested]] += 4
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        tails = [classes[p.argmax()] + "".join(f",{v:.7g}" for v in p) for p in share]
        heads = [f"{paths[i]},{classes[targets[i]]}," for i in tested]
        for number, (model, init) in enumerate(rows):  # each network gives these answers to other images
            place = np.empty(len(tested), np.int64)
            for label in range(len(classes)):
                group = np.flatnonzero(targets[tested] == label)
                place[group] = np.roll(group, 37 * number)
            file = runs / "train" / model / init / f"fold{fold}" / "predictions.csv"
            file.parent.mkdir(parents=True)
            lines = [head + tails[p] for head, p in zip(heads, place)]
            header = "path,label,prediction," + ",".join(f"p_{name}" for name in classes)
            file.write_text("\n".join([header, *lines, ""]), encoding="utf-8")
            files.append(file)
    return files


def usual_scores(file):
    """A fold's scores by csv.DictReader and scikit-learn."""
    with open(file, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    np.array([[float(value) for key, value in row.items() if key.startswith("p_")] for row in rows])
    labels, predictions = [row["label"] for row in rows], [row["prediction"] for row in rows]
    metrics.precision_recall_fscore_support(labels, predictions, zero_division=0)
    metrics.confusion_matrix(labels, predictions)


def script(name, *arguments):
    """Run one of the scripts to its end; says its peak memory."""
    process = subprocess.Popen([sys.executable, ROOT / name, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} {' '.join(map(str, arguments))}: ended with status {process.returncode}")
    say(f"  {name}: peak memory {usage.ru_maxrss / 1024:.0f} MB")


def evaluate_full_study(_, args):
    """evaluate.py on 125 runs; reference: csv.DictReader and scikit-learn on three files, times 125/3."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_study(pathlib.Path(folder))
        ours, usual = in_turn(
            lambda: script("evaluate.py", "--runs", folder),
            lambda: [usual_scores(file) for file in files[:3]],
            args.rounds,
        )
    yield "evaluate.py full study seconds", *costs(ours, usual * len(files) / 3)


def splits_full_study(_, args):
    """splits.py on 171,374 files; reference: ImageFolder, StratifiedKFold and train_test_split in-process."""
    classes, targets = full_targets()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for number, target in enumerate(targets):
            file = folder / "bm" / classes[target] / f"{number // 1000:04d}" / f"{number:06d}.jpg"
            if not file.parent.exists():
                file.parent.mkdir(parents=True)
            file.touch()

        def usual():
            found = np.array(torchvision.datasets.ImageFolder(folder / "bm").targets)
            kfold = model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
            for rest, _ in kfold.split(found, found):
                model_selection.train_test_split(rest, test_size=0.2, stratify=found[rest], random_state=0)

        def ours():
            (folder / "split.csv").unlink(missing_ok=True)
            script("splits.py", "--data", folder / "bm", "--out", folder / "split.csv")

        yield "splits.py full study seconds", *costs(*in_turn(ours, usual, args.rounds))


def overlaps_of_many(cells, args):
    """find_overlaps on pictures of which some are planted pairs; reference: decoding each picture once."""
    with tempfile.TemporaryDirectory() as folder:
        count = IMAGES if args.full else args.count
        overlap_data.make_planted(cells, folder, count, PAIRS * count // IMAGES)
        pairs = overlap_data.read_pairs(pathlib.Path(folder) / "planted.csv")
        planted = {tuple(sorted(pair)) for pair in pairs}
        many = datasets.open_dataset(folder)
        start = time.perf_counter()
        for index in range(len(many)):
            many[index]
        decoded = time.perf_counter()
        found = {tuple(sorted(row[:2])) for row in overlaps.find_overlaps(many)}
        seconds = time.perf_counter() - decoded
    hits = len(found & planted)
    say(f"  {len(planted)} planted pairs, recall {hits / len(planted):.4f}, {len(found) - hits} others found")
    yield f"overlaps.py {len(many)} images seconds", *costs(seconds, decoded - start)


MEASURES = {
    "input pipeline": input_pipeline,
    "epoch against plain loop": epoch_against_plain_loop,
    "step against bare step": step_against_bare_step,
    "evaluation against plain loop": evaluation_against_plain_loop,
    "evaluate.py full study seconds": evaluate_full_study,
    "splits.py full study seconds": splits_full_study,
    "overlaps": overlaps_of_many,
    "networks": networks,
}


def read_arguments():
    """The command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    default = [name for name in MEASURES if name != "networks"]
    names = {"choices": [*MEASURES], "metavar": "NAME", "help": "; ".join(MEASURES)}
    parser.add_argument("--only", nargs="+", default=default, **names)
    parser.add_argument("--data", help="a data set (default: cells drawn for it)")
    parser.add_argument("--model", default="resnext50_32x4d")
    parser.add_argument("--networks", nargs="+", default=list(evaluate.MODELS)[:4])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=320, help="of a round of the input pipeline")
    parser.add_argument("--steps", type=int, default=2, help="of 32 images in a round (evaluation: of 64)")
    parser.add_argument("--seconds", type=float, default=20, help="that jobs run side by side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch; OpenCV has one")
    parser.add_argument("--workers", type=int, default=0, help="data workers of both sides")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=["auto", *engine.AMP_DTYPES], default="auto")
    parser.add_argument("--memory-format", choices=engine.LAYOUTS, default="channels_last")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--full", action="store_true", help=f"overlaps of {IMAGES:,} images, not 10,000")
    args = parser.parse_args()
    args.device = train.choose_device(args.device)
    args.amp = train.choose_amp(args.device, args.amp)
    return args


def set_up(args):
    """Threads, and what train.py sets."""
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


def main():
    args = read_arguments()
    set_up(args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the scripts that are started
    say(f"{describe_machine()}, {args.threads} thread(s), --amp {args.amp}")
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["what", "ours", "reference", "unit", "ratio"])
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            demo_data.make(pathlib.Path(folder), size="tiny", seed=0, sets=("bm",))
        cells = datasets.open_dataset(args.data or pathlib.Path(folder, "bm"))
        for name in args.only:
            say(f"{name}: {MEASURES[name].__doc__} Load {os.getloadavg()[0]:.1f}.")
            for what, ours, reference, unit, ratio in MEASURES[name](cells, args):
                rows.writerow([what, f"{ours:.4g}", f"{reference:.4g}", unit, f"{ratio:.3f}"])
                sys.stdout.flush()


if __name__ == "__main__":
    main()
