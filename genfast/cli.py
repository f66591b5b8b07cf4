"""The command line: genfast info | verify | bench | train | sample | demo."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__, _info, _verify, models


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="genfast", description="Fast, exact kernels for generative models.")
    top.add_argument("--version", action="version", version=f"genfast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("info", help="versions, devices, and which backend serves which op")

    verify = commands.add_parser("verify", help="run every op on every usable backend against the float64 reference")
    verify.add_argument("--op", action="append", metavar="NAME", help="only this op; may be given several times")
    verify.add_argument("--device", choices=("cpu", "cuda"))
    verify.add_argument("--dtype", choices=tuple(_verify.DTYPES))
    verify.add_argument("--seed", type=int, help="of the random inputs, to repeat a failure")

    bench = commands.add_parser("bench", help="run the benchmark suite of a source checkout", add_help=False)
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to python -m benchmarks")

    train = commands.add_parser("train", help="train a model on images")
    train.add_argument("model", choices=tuple(models.NAMES))
    train.add_argument("--data", default="digits", help="digits, photos, torchvision:NAME or a folder of images")
    train.add_argument("--root", help="where torchvision's files are")
    train.add_argument("--size", type=int, default=32, help="side of photo patches and folder images (default 32)")
    train.add_argument("--out", type=Path, help="the run's folder (default out/MODEL-DATA)")
    train.add_argument("--steps", type=int)
    train.add_argument("--minutes", type=float)
    train.add_argument("--batch-size", type=int, default=64)
    train.add_argument("--lr", type=float, default=1e-3)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--levels", type=int, help="of Glow and RealNVP")
    train.add_argument("--hidden", type=int, help="width of the conditioner networks")
    train.add_argument("--flow-steps", type=int, metavar="K", help="Glow's steps per level")
    train.add_argument("--channels", type=int, help="of the PixelCNNs and PixelRNN; a multiple of the colours")
    train.add_argument("--layers", type=int, help="of the PixelCNNs, PixelRNN and WaveNet")
    train.add_argument("--kernel-size", type=int, help="of PixelCNN, Gated PixelCNN and WaveNet")
    train.add_argument("--filters", type=int, help="of PixelCNN++")
    train.add_argument("--reversible", action="store_true", help="Glow in memory that does not grow with K")
    train.add_argument("--device", default="cpu")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")

    sample = commands.add_parser("sample", help="draw samples from a checkpoint")
    sample.add_argument("--checkpoint", type=Path, required=True, help="a run's folder or a checkpoint in it")
    sample.add_argument("--out", type=Path, default=Path("samples.png"))
    sample.add_argument("-n", type=int, default=64)
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument(
        "--method", choices=("cached", "naive"), default="cached", help="of autoregressive models: the engine or the plain loop"
    )

    demo = commands.add_parser("demo", help="train a flow and a PixelCNN on real digits, beside plain PyTorch")
    demo.add_argument("--out", type=Path, default=Path("out/demo"))
    demo.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="how long to train the two flows; the PixelCNNs take a third",
    )
    return top


def _train(a: argparse.Namespace) -> int:
    from . import data, training

    config = {
        "levels": a.levels, "hidden": a.hidden, "steps": a.flow_steps, "reversible": a.reversible or None,
        "channels": a.channels, "layers": a.layers, "kernel_size": a.kernel_size, "filters": a.filters,
    }  # fmt: skip
    dataset = data.load(a.data, size=a.size, root=a.root, seed=a.seed)
    taken = inspect.signature(models.NAMES[a.model]).parameters
    unknown = [f"--{k.replace('_', '-')}" for k, v in config.items() if v is not None and k not in taken]
    autoregressive = issubclass(models.NAMES[a.model], models.AutoregressiveModel)
    if unknown or (autoregressive and a.levels is not None):
        raise ValueError(f"train: {a.model} takes no {', '.join(unknown) or '--levels; the data decide them'}")
    colours = dataset.shape[0]
    if "channels" in taken and a.channels is None and taken["channels"].default % (2 * colours):
        config["channels"] = -(-taken["channels"].default // (2 * colours)) * 2 * colours  # each colour gets its own
    if a.model == "glow" and a.levels is None and min(dataset.shape[1:]) < 16:
        config["levels"] = 2  # the default of three needs multiples of eight, and leaves 8x8 images one position
    out = a.out or Path("out", f"{a.model}-{dataset.name}")
    metrics = training.train(
        a.model, dataset, out, config={k: v for k, v in config.items() if v is not None}, steps=a.steps, minutes=a.minutes,
        batch_size=a.batch_size, lr=a.lr, seed=a.seed, device=a.device, resume=a.resume,
    )  # fmt: skip
    print(f"{metrics['steps']} steps, {metrics['test_bits_per_dim']:.3f} bits/dim on held-out images; see {out}")
    return 0


def _sample(a: argparse.Namespace) -> int:
    from . import training

    model, metadata, checkpoint = training.load_checkpoint(a.checkpoint)
    options = {"temperature": a.temperature, "generator": torch.Generator().manual_seed(a.seed)}
    if isinstance(model, models.AutoregressiveModel):
        options |= {"method": a.method, "progress": True}
    images = model.sample(a.n, **options)
    if len(model.shape) < 3:  # a model of vectors or sequences: square grey images
        dim = model.shape[-1]
        side = int(dim**0.5)
        if side * side != dim:
            raise ValueError(f"sample: {checkpoint} makes vectors of {dim}, which are no square images")
        images = images.reshape(-1, 1, side, side)
    training.save_picture(training.image_grid(images, int(metadata["bins"])), a.out)
    print(f"{a.n} samples from step {metadata['step']} in {a.out}")
    return 0


def _bench(a: argparse.Namespace) -> int:
    if importlib.util.find_spec("benchmarks") is None and not Path("benchmarks", "__main__.py").exists():
        raise FileNotFoundError("bench: the benchmarks are in the source checkout; run this from its top folder")
    return subprocess.run([sys.executable, "-m", "benchmarks", *a.arguments], check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Errors are one line on standard error and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:  # everything behind it belongs to the suite, options too
        a = argparse.Namespace(command="bench", arguments=words[1:])
    else:
        a = parser().parse_args(words)
    try:
        if a.command == "info":
            _info.print_info()
            return 0
        if a.command == "verify":
            return _verify.run(a.op, a.device, a.dtype, a.seed)
        if a.command == "demo":
            from . import demo

            return demo.run(a.out, a.seconds)
        return {"bench": _bench, "train": _train, "sample": _sample}[a.command](a)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"genfast: error: {error}", file=sys.stderr)
        return 2
