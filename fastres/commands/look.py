"""``fastres look``: draw what a network sees in a photograph, in one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastres.arguments import CATEGORIES_HELP, MODEL_HELP, whole_number
from fastres.errors import ImageError
from fastres.files import refuse_inputs
from fastres.terminal import progress_bar, wrote
from fastres.text import path_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres look`` to ``parser``."""
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="an image file")
    add("--model", default="resnet50", help=MODEL_HELP)
    add("--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("-o", "--out", type=Path, default=Path("look.png"), help="PNG, JPEG, PDF or SVG file (default: %(default)s)")
    add("--top-k", type=int, default=3, metavar="K", help="number of classes to draw maps for (default: %(default)s)")
    add("--device", default=None, help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", default="auto", help="float32, bfloat16, float16 (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Check the picture's path and the image, load the model, draw the picture and write it."""
    import torch

    from fastres.images.decoding import load_image
    from fastres.look.figures import DPI, look
    from fastres.look.pictures import checked_picture, require_matplotlib, save_picture
    from fastres.model.loading import load
    from fastres.weights.sources import input_files

    require_matplotlib()
    whole_number(options.top_k, "--top-k")
    out = checked_picture(options.out, "look.png")
    refuse_inputs(out, [options.image, *input_files(options.model, options.weights, options.categories)])
    if options.image.is_dir():
        raise ImageError(f"{path_text(options.image)} is a folder; give one image file in it")
    load_image(options.image)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with progress_bar(total=3, bar_format="{desc:<6} {bar} {elapsed}", disable=None) as bar:
        bar.set_description_str("load")
        model = load(options.model, options.weights, dtype=options.dtype, device=device, categories=options.categories)
        bar.update()
        bar.set_description_str("look")
        figure = look(model, options.image, options.top_k)
        bar.update()
        bar.set_description_str("write")
        save_picture(figure, out, DPI)
        bar.update()
    wrote(out)
    print(f"{path_text(out)}: what {model.architecture.name} sees in {path_text(options.image)}")
