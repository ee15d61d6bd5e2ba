"""Network architectures, the weights they start from, and their layers for Grad-CAM.

    python models.py                                # Table 3: ImageNet accuracies and parameter counts, the paper's beside

build_model gives any classification model of torchvision with a new last layer; weights come from nowhere (random), from
ImageNet or from a checkpoint of ours. Files are only ever read with weights_only=True: no code in them is run.
"""
import difflib
import http.client
import os
import pathlib
import pickle
import socket
import sys

import torch
import torchvision

ARCHITECTURES = {  # Table 3: the paper's name, weights of those accuracies, Acc@1, Acc@5, parameters (of 1,000 classes)
    "vgg19_bn": ("VGG-19 BN", "IMAGENET1K_V1", 74.218, 91.842, 143_678_248),
    "resnet152": ("ResNet-152", "IMAGENET1K_V2", 82.284, 96.002, 60_192_808),
    "regnet_y_32gf": ("Regnet_y_32gf", "IMAGENET1K_V2", 83.368, 96.498, 145_046_770),
    "vit_l_32": ("ViT l 32", "IMAGENET1K_V1", 76.972, 93.07, 306_535_400),
    "resnext50_32x4d": ("ResNeXt-50", "DEFAULT", None, None, None),  # baseline of Matek et al., random only, not in Table 3
}
INITS = ("random", "imagenet", "pcam", "cd", "imagenet+pcam", "imagenet+cd")
CHECKPOINT_KEYS = "state_dict model classes mean std image_size init fold epoch val_accuracy train_counts".split()
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # side outputs of googlenet and inception_v3, left out here
FETCH_TIMEOUT = 60  # seconds without a byte


def check_name(name, image_size=None, weights=None):
    """ValueError, with what there is instead, for a model, an image size (pixels) or ImageNet weights that don't exist."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(str(name).lower(), known, 3) or list(ARCHITECTURES)
        raise ValueError(f"{name}: no classification model of torchvision; do you mean {', '.join(close)}?")
    patch = int(name.rsplit("_", 1)[1]) if name.startswith("vit_") else 224 if name == "maxvit_t" else 1
    if image_size is not None and (image_size < 1 or image_size % patch):
        raise ValueError(f"{name}: image size {image_size} is no multiple of {patch} pixels; "
                         f"try {max(1, round(image_size / patch)) * patch}")
    if weights is not None:
        find_weights(name, weights)


def find_weights(name, weights="imagenet"):
    """torchvision's entry for ImageNet weights: 'imagenet' for Table 3's, or a name such as IMAGENET1K_V1. ValueError if unknown."""
    entries = torchvision.models.get_model_weights(name)
    wanted = ARCHITECTURES.get(name, ("", "DEFAULT"))[1] if weights.lower() == "imagenet" else weights.upper()
    if wanted not in entries.__members__:
        raise ValueError(f"{name}: no weights {weights}; torchvision has {', '.join(entries.__members__) or 'none'}")
    return entries[wanted]


def imagenet_file(name, weights="imagenet"):
    """(URL, Path) of a model's ImageNet weights: the place in torch.hub's folder (TORCH_HOME), whether the file is there or not."""
    url = find_weights(name, weights).url
    return url, pathlib.Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def build_model(name, num_classes, weights=None, image_size=224):
    """A torchvision network (float32, on the CPU) whose last layer is a new one of num_classes units (section 2.2).

    weights: None (random, from torch's global generator, which the caller seeds), 'imagenet' (those of Table 3),
    torchvision's name of ImageNet weights, or the path of a best.pt, whose tensors are copied, all but the head's.
    Whatever the weights, the new head has nn.Linear's own initialisation, drawn after the random network's. Position
    embeddings of a ViT are interpolated to image_size (pixels). ValueError for arguments that don't exist (check_name),
    SystemExit with one line for a file that is missing, damaged or of another network.
    """
    from_imagenet = str(weights).upper().startswith("IMAGENET")
    check_name(name, image_size, weights if from_imagenet else None)
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    net = torchvision.models.get_model(name, weights=None, **options)
    if from_imagenet:
        url, file = imagenet_file(name, weights)
        advice = f"remove it and put {url} there"
        if not file.exists():
            fetch(url, file)
        state = {key: tensor for key, tensor in read_file(file, advice).items() if not str(key).startswith(AUXILIARY)}
        load_state(net, state, image_size, f"{file}: not the ImageNet weights of {name}", advice)
    replace_head(net, num_classes)
    if weights is not None and not from_imagenet:
        state = read_checkpoint(weights, model=name)["state_dict"]
        head = head_name(net) + "."
        state = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
        state.update({head + key: tensor for key, tensor in net.get_submodule(head[:-1]).state_dict().items()})
        load_state(net, state, image_size, f"{weights}: not the weights of {name}", "name another checkpoint")
    return net


def head_name(net):
    """Dotted name of the last linear layer: 'fc', 'classifier.6', 'heads.head' (of a SqueezeNet, its last convolution)."""
    layers = [(name, type(module)) for name, module in net.named_modules()]
    linear = [name for name, kind in layers if kind is torch.nn.Linear]
    return (linear or [name for name, kind in layers if kind is torch.nn.Conv2d])[-1]


def replace_head(net, num_classes):
    """Put a new layer of num_classes units in the place of the last one."""
    name = head_name(net)
    old = net.get_submodule(name)
    new = (torch.nn.Linear(old.in_features, num_classes) if isinstance(old, torch.nn.Linear)
           else torch.nn.Conv2d(old.in_channels, num_classes, old.kernel_size))
    above, _, last = name.rpartition(".")
    setattr(net.get_submodule(above), last, new)


def fetch(url, file):
    """Download url to file with a progress bar, hash checked, whole or not at all. SystemExit with one line if it can't be had."""
    print(f"fetching {url} to {file}", file=sys.stderr, flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(FETCH_TIMEOUT)
    try:
        os.makedirs(file.parent, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rsplit("-", 1)[-1])
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise SystemExit(f"{url} can't be fetched ({one_line(error)}); put that file, got elsewhere, at {file}") from None
    finally:
        socket.setdefaulttimeout(before)


def read_file(file, advice):
    """The dict that a .pt or .pth file holds. SystemExit with one line if it is missing, damaged, or more than plain data."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = "Weights only" in str(error) and "nsupported" in str(error)
        raise SystemExit(f"{file}: {'holds more than tensors and plain data, nothing of it was run' if code else 'damaged'};"
                         f" {advice}") from None
    except OSError as error:
        raise SystemExit(f"{file}: {error.strerror or error}; {advice}") from None
    except Exception as error:  # torch raises what the damage leads to: RuntimeError, EOFError, KeyError, ...
        raise SystemExit(f"{file}: damaged or cut short ({one_line(error)}); {advice}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{file}: holds a {type(content).__name__}, no weights; {advice}")
    return content


def read_checkpoint(path, model=None):
    """The dict of a best.pt, checked to be one (of that model). SystemExit with one line if it isn't."""
    advice = "name a best.pt that train.py or pretrain.py left"
    content = read_file(path, advice)
    missing = [key for key in CHECKPOINT_KEYS if key not in content]
    if missing:
        raise SystemExit(f"{path}: no checkpoint of ours, without {', '.join(missing[:3])}; {advice}")
    if model is not None and content["model"] != model:
        raise SystemExit(f"{path}: a checkpoint of {content['model']}, not of {model}; {advice}")
    return content


def load_state(net, state, image_size, what, advice):
    """Copy state into net, every tensor by its name. SystemExit names the first that is missing, too many or of another shape."""
    state, own = dict(state), net.state_dict()
    position = "encoder.pos_embedding"
    if position in own and getattr(state.get(position), "ndim", 0) == 3:
        try:
            state = torchvision.models.vision_transformer.interpolate_embeddings(image_size, net.patch_size, state)
        except (ValueError, RuntimeError) as error:
            raise SystemExit(f"{what} ({one_line(error)}); {advice}") from None
    wrong = [f"{key} is missing" for key in own if key not in state] + [f"{key} is unknown" for key in state if key not in own]
    shapes = {key: tuple(getattr(tensor, "shape", ())) for key, tensor in state.items()}
    wrong += [f"{key} is {shapes[key]}, not {tuple(own[key].shape)}" for key in own if key in shapes and shapes[key] != own[key].shape]
    if wrong:
        raise SystemExit(f"{what} ({wrong[0]}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}); {advice}")
    net.load_state_dict(state)


def load_checkpoint(path):
    """(network with its trained head, in eval mode, float32 on the CPU; everything else that a best.pt holds as a dict).

    SystemExit with one line for a file that isn't a checkpoint of ours or doesn't fit the network that it names.
    """
    info = read_checkpoint(path)
    state, classes, advice = info.pop("state_dict"), info["classes"], "name a best.pt that train.py or pretrain.py left"
    try:
        if not classes or not isinstance(classes, list) or len(info["train_counts"]) != len(classes):
            raise ValueError("its classes and train_counts do not agree")
        check_name(info["model"], info["image_size"])
        net = build_model(info["model"], len(classes), None, info["image_size"])
        units = len(state[head_name(net) + ".bias"])
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{path}: no checkpoint of ours ({one_line(error)}); {advice}") from None
    if units != len(classes):
        raise SystemExit(f"{path}: names {len(classes)} classes, but its last layer has {units} units; {advice}")
    load_state(net, state, info["image_size"], f"{path}: not the weights of {info['model']}", advice)
    return net.eval(), info


def one_line(error):
    """The first line of an error's text, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cam_layer(net):
    """The layer that Grad-CAM looks at: the last one that still has a place for what it sees (VGG: the last ReLU before the pooling).

    A ViT's class token alone decides, so that the patches of its last block's output have no gradient: that block's first norm.
    """
    if isinstance(net, torchvision.models.VisionTransformer):
        return net.encoder.layers[-1].ln_1
    for name in ("permute", "layer4", "trunk_output", "conv5", "layers", "Mixed_7c", "inception5b", "features", "blocks"):
        if hasattr(net, name):  # permute: Swin's, where its channels come first
            layer = getattr(net, name)
            pooled = name == "features" and isinstance(layer[-1], torch.nn.MaxPool2d)
            return layer[-2] if pooled else layer[-1] if name == "blocks" else layer
    raise ValueError(f"{type(net).__name__}: no layer for Grad-CAM is known")


def cam_reshape(net):
    """For a ViT, what turns its tokens [N, 1 + h*w, C] into a grid [N, C, h, w] without the class token; None for a CNN."""
    if not isinstance(net, torchvision.models.VisionTransformer):
        return None
    side = net.image_size // net.patch_size
    return lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def main():
    print(f"{'':<16}{'Table 3':<16}{'Acc@1':>9}{'paper':>9}{'Acc@5':>9}{'paper':>9}{'#Params':>14}{'paper':>14}  weights")
    for name, (paper_name, _, *paper) in ARCHITECTURES.items():
        entry, net = find_weights(name), torchvision.models.get_model(name)
        accuracy = entry.meta["_metrics"]["ImageNet-1K"]
        ours = accuracy["acc@1"], accuracy["acc@5"], sum(p.numel() for p in net.parameters())
        cells = [f"{value:>{width},}" if value else f"{'-':>{width}}"
                 for pair, width in zip(zip(ours, paper), (9, 9, 14)) for value in pair]
        print(f"{name:<16}{paper_name:<16}{''.join(cells)}  {entry.name}")


if __name__ == "__main__":
    main()
