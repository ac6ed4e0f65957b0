"""The arguments of `raylight benchmark`, read without importing torch."""

from __future__ import annotations

import argparse


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    place = "checkpoint (folder, version or .ckpt), or a file of --save"
    parser.add_argument("first", metavar="A", help=place)
    parser.add_argument("second", metavar="B", nargs="?", help=f"{place}, to be compared with A")
    parser.add_argument("--module", metavar="PLACE", help="class of the module: file.py:Net or package.module:Net")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a version (best)")
    parser.add_argument(
        "--input-shape", metavar="N,N,...", type=_numbers,
        help="shape of one sample, of random numbers (default: the module's example_input_array)",
    )  # fmt: skip
    parser.add_argument("--batch-sizes", metavar="N,N,...", type=_numbers, help="samples of a batch, one or several")
    parser.add_argument("--precision", metavar="P,P,...", type=_words, default=["32-true"], help="as precision of fit")
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="no", help="use torch.compile (no)")
    parser.add_argument("--stage", default="predict", help="predict, validate, test or train (predict)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (the GPU if there is one)")
    parser.add_argument("--max-s", type=float, default=5.0, help="seconds for each figure at most (5)")
    parser.add_argument("--spread", type=float, default=0.02, help="share to which a median is to be known (0.02)")
    parser.add_argument("--save", metavar="FILE", help="write the figures of A as JSON")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of A's figures: .png, .svg or .pdf")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
