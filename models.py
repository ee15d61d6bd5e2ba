"""Network architectures, the weights they start from, and their layers for Grad-CAM.

    python models.py                               # Table 3: ImageNet accuracies and parameters
    python models.py --fetch resnet152 vit_l_32    # fetches ImageNet weights for a night without network

Any classification model of torchvision gets a new last layer, and any of timm's where timm is installed (pip
install timm). Files are read as mere data: weights_only=True.
"""

import argparse
import difflib
import os
import pathlib
import re
import signal
import socket
import sys

import torch
import torchvision

try:
    import timm
except ImportError:  # an extra
    timm = None

ARCHITECTURES = {  # the weights whose accuracies Table 3 prints; ResNeXt-50, of Matek et al., is not in it
    "vgg19_bn": "IMAGENET1K_V1",
    "resnet152": "IMAGENET1K_V2",
    "regnet_y_32gf": "IMAGENET1K_V2",
    "vit_l_32": "IMAGENET1K_V1",
    "resnext50_32x4d": "DEFAULT",
}
INITS = ("random", "imagenet", "pcam", "cd", "imagenet+pcam", "imagenet+cd")
KEYS = "state_dict model classes mean std image_size init fold epoch val_accuracy train_counts".split()
OURS = "name a best.pt that train.py or pretrain.py left"


def is_timm(name):
    """Is it a network of timm's alone? torchvision's of the same name comes first."""
    ours = torchvision.models.list_models(module=torchvision.models)
    return name not in ours and timm is not None and timm.is_model(name)


def check_name(name, weights=None):
    """ValueError names what is wrong with a model or a name of ImageNet weights."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known and not is_timm(name):
        where = "torchvision (timm is not installed)" if timm is None else "torchvision or timm"
        close = difflib.get_close_matches(str(name).lower(), known) or ARCHITECTURES
        raise ValueError(f"{name}: no classification model of {where}; do you mean {', '.join(close)}?")
    if weights is not None:
        find_weights(name, weights)


def check_forward(name, image_size, batch_size):
    """ValueError if the network cannot train on so many images of image_size pixels; computes nothing."""
    try:
        net = build_model(name, 2, None, image_size).to("meta").train()
        net(torch.empty(batch_size, 3, image_size, image_size, device="meta"))
    except (AssertionError, RuntimeError, ValueError) as error:
        what = f"{name} cannot be trained with {batch_size} images of {image_size} pixels"
        raise ValueError(f"{what}: {' '.join(str(error).split())[:200]}") from None


def find_weights(name, weights="imagenet"):
    """The library's entry for ImageNet weights: 'imagenet' (Table 3's, or its default), or by their name.

    ValueError without one.
    """
    if is_timm(name):
        try:
            tag = "" if weights.lower() == "imagenet" else f".{weights}"
            return timm.models.get_pretrained_cfg(name + tag)
        except RuntimeError:
            tags = ", ".join(full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*"))
            raise ValueError(f"{name}: no weights {weights}; timm has {tags or 'none'}") from None
    entries = torchvision.models.get_model_weights(name).__members__
    default = ARCHITECTURES.get(name, "DEFAULT")
    wanted = default if weights.upper() == "IMAGENET" else weights.upper()
    if wanted not in entries:
        raise ValueError(f"{name}: no weights {weights}; torchvision has {', '.join(entries) or 'none'}")
    return entries[wanted]


def is_imagenet(weights):
    """Are build_model's weights the name of a library's? It has neither dot nor slash."""
    return weights is not None and re.fullmatch(r"\w+", str(weights)) is not None


def imagenet_file(name, weights="imagenet"):
    """(URL, Path) of ImageNet weights: the place that torch.hub (TORCH_HOME) has for them, filled or not."""
    entry = find_weights(name, weights)
    if is_timm(name):
        url = f"https://huggingface.co/{entry.hf_hub_id}/resolve/main/model.safetensors"
        file = f"{name}.{entry.tag}.safetensors"
    else:
        url = entry.url
        file = url.rsplit("/", 1)[1]
    return url, pathlib.Path(torch.hub.get_dir()) / "checkpoints" / file


def initial_weights(runs, model, init, weights):
    """What build_model starts from: None, the name of ImageNet weights, or a checkpoint's path."""
    if init in ("random", "imagenet"):
        return None if init == "random" else weights
    folder = runs / "pretrain" / model / init
    file = init.split("=", 1)[1] if "=" in init else folder / "best.pt"
    if "=" in init and not os.path.isfile(file):
        raise SystemExit(f"--init {init}: {file!r} is no file; {OURS}")
    if "=" not in init and not (folder / "predictions.csv").exists():
        command = f"python pretrain.py --model {model} --init {init} --runs {runs}"
        raise SystemExit(f"{folder}: no finished pre-training; run first: {command}")
    return os.path.abspath(file)


def build_model(name, num_classes, weights=None, image_size=224):
    """A network of torchvision or timm (float32, CPU) whose last layer is new, of num_classes units (2.2).

    weights: None (random, from torch's global generator), 'imagenet' (Table 3's), the library's name of
    others, or the path of a best.pt or a state dict (DINOv2's with its 'teacher', too): all but the head is
    copied, which is nn.Linear's random one, alike for all weights. ValueError as check_name's, SystemExit for
    a bad file.
    """
    check_name(name, weights if is_imagenet(weights) else None)
    if is_timm(name):
        fixed = timm.models.get_pretrained_cfg(name).fixed_input_size  # a ViT's, say
        net = timm.create_model(name, num_classes=num_classes, **({"img_size": image_size} if fixed else {}))
    else:
        options = {"image_size": image_size} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):  # without their side outputs
            options = {"aux_logits": False, "init_weights": True}
        net = torchvision.models.get_model(name, weights=None, **options)
    old = net.get_submodule(head_name(net))
    if isinstance(old, torch.nn.Linear):
        new = torch.nn.Linear(old.in_features, num_classes)
    else:
        new = torch.nn.Conv2d(old.in_channels, num_classes, old.kernel_size)
    net.set_submodule(head_name(net), new)
    advice = f"{OURS}, or a state dict of {name}"
    if is_imagenet(weights):
        url, weights = fetch(name, weights)
        advice = f"remove it and put {url} there"
    if weights is not None:
        content = read_file(weights, advice)
        inner = [
            content[key] for key in ("state_dict", "model", "teacher") if isinstance(content.get(key), dict)
        ]
        load_state(net, inner[0] if inner else content, weights, name, advice)
    return net


def head_name(net):
    """Dotted name of the last layer with weights, e.g. 'fc', 'classifier.6', 'heads.head'."""
    if hasattr(net, "default_cfg"):  # timm's
        return net.default_cfg["classifier"]
    layers = net.named_modules()
    return [name for name, layer in layers if type(layer) in (torch.nn.Linear, torch.nn.Conv2d)][-1]


def freeze(net):
    """net, of which the last layer alone learns (linear probing): all other weights need no gradient."""
    net.requires_grad_(False).get_submodule(head_name(net)).requires_grad_(True)
    return net


def fetch(name, weights="imagenet"):
    """(URL, Path) of ImageNet weights, downloaded if need be, with a hash check. SystemExit if that fails."""
    url, file = imagenet_file(name, weights)
    if file.exists():
        return url, file
    print(f"fetching {url} to {file}", file=sys.stderr)
    socket.setdefaulttimeout(60)  # seconds without a byte; torch.hub sets none
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = None if is_timm(name) else file.stem[-8:]  # of the hash, in torchvision's names
        torch.hub.download_url_to_file(url, str(file), prefix, sys.stderr.isatty())
    except Exception as error:  # no network, no room, a wrong hash, ...
        raise SystemExit(f"{url}: cannot be fetched ({error}); get it elsewhere, put it at {file}") from None
    return url, file


def read_file(file, advice=OURS):
    """The dict in a .pt or .pth file. SystemExit if it is missing, damaged or more than plain data."""
    try:
        if str(file).endswith(".safetensors"):  # timm's, which brings the package
            import safetensors.torch

            return safetensors.torch.load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            return content
        raise TypeError
    except Exception as error:  # no such file, or what damage leads to: EOFError, KeyError, ...
        why = "damaged or cut short, holds no weights, or holds more than tensors (nothing of it was run)"
        raise SystemExit(f"{file}: {getattr(error, 'strerror', None) or why}; {advice}") from None


def load_state(net, state, file, name, advice=OURS, head=False):
    """Move tensors (dict by name) into net, whose own last layer stays without head. SystemExit if unfit.

    A ViT's position embeddings are interpolated to net's image size. Each tensor of net must be there.
    """
    try:
        for key in list(state):  # prefixes are torch.compile's, DistributedDataParallel's and DINOv2's
            new, value = re.sub(r"^((_orig_mod|module|backbone)\.)+", "", key), state.pop(key)
            new = re.sub(r"(denselayer\d+\.(norm|conv))\.", r"\1", new)  # ImageNet files have older names
            if not new.startswith(
                ("aux1.", "aux2.", "AuxLogits.", "dino_head.", "ibot_head.")
            ):  # side outputs
                state[new] = value
        if not head:
            last = head_name(net) + "."
            state |= {key: value for key, value in net.state_dict().items() if key.startswith(last)}
        if isinstance(net, torchvision.models.VisionTransformer):
            interpolate = torchvision.models.vision_transformer.interpolate_embeddings
            state = interpolate(net.image_size, net.patch_size, state)
        elif hasattr(net, "num_prefix_tokens") and "pos_embed" in state:
            state = timm.models.vision_transformer.checkpoint_filter_fn(state, net)
        net.load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).splitlines()[:2][-1].strip()[:200]  # PyTorch's first line says only of which class
        raise SystemExit(f"{file}: not the weights of {name} ({why}); {advice}") from None


def read_checkpoint(path):
    """The dict of a best.pt. SystemExit with one line if the file is no such thing."""
    content = read_file(path)
    missing = [key for key in KEYS if content.get(key) is None]
    if missing:
        raise SystemExit(f"{path}: no checkpoint of ours, it lacks {', '.join(missing[:3])}; {OURS}")
    return content


def load_checkpoint(path):
    """(trained network in eval mode, float32, CPU; dict of all else in a best.pt). SystemExit if unfit."""
    info = read_checkpoint(path)
    try:
        net = build_model(info["model"], len(info["classes"]), None, info["image_size"])
    except ValueError as error:  # a model that this torchvision does not have
        raise SystemExit(f"{path}: {error}; {OURS}") from None
    load_state(net, info.pop("state_dict"), path, info["model"], head=True)
    return net.eval(), info


def cam_layer(net):
    """Grad-CAM's layer: the last one in which place is kept (VGG: the last ReLU before the pooling).

    SystemExit for a network of which none is known.
    """
    if hasattr(net, "num_prefix_tokens"):  # timm's transformers
        return net.blocks[-1].norm1
    if hasattr(net, "feature_info"):  # timm's other networks
        return net.get_submodule(net.feature_info[-1]["module"])
    if isinstance(net, torchvision.models.VisionTransformer):  # later on, patches have no gradient
        return net.encoder.layers[-1].ln_1
    if hasattr(net, "features") and isinstance(net.features[-1], torch.nn.MaxPool2d):
        return net.features[-2]
    for name in "permute layer4 trunk_output conv5 layers Mixed_7c inception5b features".split():
        if hasattr(net, name):  # permute: Swin's, where channels come first
            return getattr(net, name)
    if isinstance(net, torchvision.models.MaxVit):
        return net.blocks[-1]
    raise SystemExit(f"no layer for Grad-CAM is known of {type(net).__name__}: add it to models.cam_layer")


def cam_reshape(net):
    """For a ViT, turns tokens [N, 1 + h*w, C] into a grid [N, C, h, w] without the class token; else None."""
    if isinstance(net, torchvision.models.VisionTransformer):
        side = net.image_size // net.patch_size
        return lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    if hasattr(net, "num_prefix_tokens"):  # timm's, with the class token, registers
        first, grid = net.num_prefix_tokens, net.patch_embed.grid_size
        return lambda tokens: tokens[:, first:].transpose(1, 2).unflatten(2, grid)


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fetch", nargs="+", default=[], metavar="MODEL", help="fetch ImageNet weights")
    parser.add_argument("--weights", default="imagenet", help="Table 3's, or by name, e.g. IMAGENET1K_V1")
    args = parser.parse_args()
    try:
        for name in args.fetch:
            check_name(name, args.weights)
    except ValueError as error:
        parser.error(str(error))
    for name in args.fetch:
        print(fetch(name, args.weights)[1])
    if args.fetch:
        return
    line = "{:<16}{:>8}{:>8}{:>13,}  {}"
    print(line.replace(",", "").format("Table 3", "Acc@1", "Acc@5", "#Params", "weights"))
    for name in ARCHITECTURES:
        weights = find_weights(name)
        accuracies = weights.meta["_metrics"]["ImageNet-1K"].values()
        print(line.format(name, *accuracies, weights.meta["num_params"], weights.name))


if __name__ == "__main__":
    main()
