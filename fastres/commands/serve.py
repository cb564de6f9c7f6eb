"""``fastres serve``: the command line of :func:`fastres.serve`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fastres.arguments import CATEGORIES_HELP, MODEL_HELP
from fastres.terminal import say

KEY_VARIABLE = "FASTRES_API_KEY"
EXAMPLES = """examples:
  fastres serve resnet50
  fastres serve resnet50 --host 0.0.0.0 --port 80 --max-queue 256
  fastres serve resnet50-int8.safetensors --max-batch 4
  curl --data-binary @photo.jpg http://127.0.0.1:8000/classify
  curl -F a=@one.jpg -F b=@two.jpg http://127.0.0.1:8000/classify?top_k=1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastres serve`` to ``parser``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", nargs="?", default="resnet50", metavar="MODEL", help=MODEL_HELP)
    add("--weights", default="DEFAULT", help="an entry such as IMAGENET1K_V1, or the path of a checkpoint")
    add("--categories", metavar="FILE", help=CATEGORIES_HELP)
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: all GPUs if there are any)")
    add("--dtype", default="auto", help="float32, bfloat16, float16, int8 (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: one per core, up to 16)")
    add("--decoder", default="fast", help="fast (default), or exact: the same pixels as 'fastres predict'")
    add("--max-batch", type=int, metavar="N", help="images in a batch (default: 8, 128 on a GPU)")
    add("--max-wait-ms", type=float, default=0.0, metavar="MS", help="wait for a fuller batch (default: 0)")
    add("--max-queue", type=int, metavar="N", help="images in the server at a time; more get 429 (default: 8 batches)")
    add("--max-bytes", type=int, default=20_000_000, metavar="N", help="size of a request (default: %(default)s)")
    add("--max-pixels", type=int, default=50_000_000, metavar="N", help="pixels of an image (default: %(default)s)")
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds for a request (default: %(default)g)")
    add("--api-key", metavar="KEY", help=f"key that requests must send (default: the variable {KEY_VARIABLE})")
    add("--allow-urls", nargs="+", default=[], metavar="HOST", help="fetch images from these hosts (default: none)")
    add("--cors-origin", nargs="+", default=[], metavar="ORIGIN", help="web pages that may use it (default: none)")


def run(options: argparse.Namespace) -> None:
    """Serve until the program is told to end."""
    from fastres.serving import serve

    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE) or None

    def announce(url: str, served: Any) -> None:
        model = served.identity
        described = f"{model['name']} ({model['weights']}), {model['dtype']} on {model['device']}"
        print(f"Serving {described} at {url}", flush=True)

    say(f"fastres: loading {options.model}; the first answers are possible in some seconds")
    serve(
        options.model, options.weights, host=options.host, port=options.port, device=options.device,
        dtype=options.dtype, categories=options.categories, workers=options.workers, decoder=options.decoder,
        max_batch=options.max_batch, max_wait_ms=options.max_wait_ms, max_queue=options.max_queue,
        max_bytes=options.max_bytes, max_pixels=options.max_pixels, timeout=options.timeout, api_key=key,
        allow_urls=options.allow_urls, cors_origins=options.cors_origin, announce=announce,
    )  # fmt: skip
