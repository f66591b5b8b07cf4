"""The command line: genfast info | verify | bench | train | sample | style | demo."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from safetensors import SafetensorError

from . import __version__, _files, _info, _signals, _verify, losses, models
from .training import TrainingError, checkpoints, data, distributed, pictures, runs
from .training.trainer import IMPORTANCE_SAMPLES

BACKGROUND = "behind what is transparent in pictures: white (default), black, #20a0ff"


class _Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog.removeprefix('genfast').strip()}: {message}".removeprefix(": "))


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="genfast", description="Fast, exact kernels for generative models.")
    top.add_argument("--version", action="version", version=f"genfast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("info", help="versions, devices, and which backend serves which op")

    verify = commands.add_parser("verify", help="run every op on every usable backend against the float64 reference")
    verify.add_argument("--op", action="append", metavar="NAME", help="only this op; may be given several times")
    verify.add_argument("--device", choices=("cpu", "cuda"))
    verify.add_argument("--dtype", choices=tuple(_verify.DTYPES))
    verify.add_argument("--seed", type=int, help="of the random inputs, to repeat a failure")
    verify.add_argument(
        "--odd",
        action=argparse.BooleanOptionalAction,
        help="also strided and channels_last inputs, prime, single and empty batches, long rows (default on a GPU)",
    )
    verify.add_argument("--jobs", type=int, help="processes that share the work (default: one a core on a GPU)")
    verify.add_argument("--minutes", type=float, help="begin nothing later, and say what was left out")
    verify.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")

    # main takes these two before this parser sees them: they are here for the list of commands.
    commands.add_parser("bench", help="run the benchmark suite of a source checkout")
    commands.add_parser("train", help="train a model on images, or a GAN on points too: genfast train MODEL --help")

    sample = commands.add_parser("sample", help="draw samples from a checkpoint")
    sample.add_argument("--checkpoint", type=Path, required=True, help="a run's folder or a checkpoint in it")
    sample.add_argument("--out", type=Path, default=Path("samples.png"))
    sample.add_argument("-n", type=int, default=64)
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--label", type=int, help="of a model with classes; all in turn without")
    sample.add_argument(
        "--method",
        choices=("cached", "naive"),
        default="cached",
        help="of autoregressive models: the engine or the plain loop",
    )
    sample.add_argument("--device", default="cpu", help="cpu or cuda; under torchrun the processes share the samples")

    style = commands.add_parser("style", help="paint one picture in the style of another")
    style.add_argument("--content", required=True, metavar="PICTURE", help="a file, or scikit-learn's china or flower")
    style.add_argument("--style", required=True, metavar="PICTURE", help="likewise")
    style.add_argument("--out", type=Path, default=Path("styled.png"))
    style.add_argument("--sheet", type=Path, metavar="FILE", help="content, style and result side by side")
    style.add_argument("--size", type=int, default=256, help="longer side in pixels (default 256)")
    style.add_argument("--background", default="white", metavar="COLOUR", help=BACKGROUND)
    style.add_argument("--steps", type=int, default=200)
    style.add_argument("--optimizer", choices=("lbfgs", "adam"), default="lbfgs")
    style.add_argument("--loss", choices=("gram", "contextual"), default="gram", help="of the style")
    style.add_argument(
        "--style-weight",
        type=float,
        metavar="W",
        help="default 100, with the random network 10, of the contextual loss 1; the content's is 1",
    )
    style.add_argument("--tv-weight", type=float, default=0.0, metavar="W", help="of the total variation, to smooth")
    style.add_argument("--init", choices=("content", "noise", "style"), default="content")
    style.add_argument(
        "--network",
        default="random",
        metavar="NAME",
        help="random (by the seed), vgg16, vgg19, or FILE.py:FUNCTION, which returns a network in evaluation mode",
    )
    style.add_argument("--weights", type=Path, metavar="FILE", help="of vgg16 or vgg19; torchvision's by default")
    colours = "of a FUNCTION's network, which takes colours in [0, 1] with none"
    style.add_argument("--normalization", choices=("imagenet", "none"), help=colours)
    style.add_argument(
        "--content-layers",
        metavar="NAMES",
        help="with commas (default relu4_2; of the random network, whose deep layers keep little of a picture, "
        "relu2_1)",
    )
    style.add_argument(
        "--style-layers", metavar="NAMES", help="default relu1_1 to relu5_1, of the contextual loss relu3_2,relu4_2"
    )
    style.add_argument("--seed", type=int, default=0, help="of the random network and of the noise")
    style.add_argument("--device", default="cpu")

    demo = commands.add_parser("demo", help="train a flow, a PixelCNN and a WGAN-GP beside plain PyTorch")
    demo.add_argument("--out", type=Path, default=Path("out/demo"))
    demo.add_argument(
        "--seconds", type=float, default=60.0, help="of the two flows; the other models take a third each"
    )
    return top


# ---- the options of genfast train ----

RUN_OPTIONS = ("steps", "minutes", "batch_size", "lr", "seed", "device", "resume", "sample_every", "parallel")
RENAMED = {"steps": "flow_steps"}  # a parameter of a model whose name the run has


class number(float):  # named as the help shows it
    """A float of the command line: jsonargparse takes nan and inf, which have messages of their own, for words."""


def _descriptions(owner: object) -> dict[str, str]:
    """The Args section of a docstring by parameter; "as :class:`Other`" stands for Other's own."""
    section = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.getdoc(owner) or "", re.MULTILINE)
    entry, texts = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n     +.*)*)", re.MULTILINE), dict[str, str]()
    for names, text in entry.findall(section[1] if section else ""):
        other = re.match(r"as (?:in )?:class:`(\w+)`", text)
        described = _descriptions(getattr(models, other[1])) if other else {}
        plain = re.sub(r":\w+:`~?([^`]+)`", r"\1", " ".join(text.split())).replace("``", "").replace("%", "%%")
        texts |= {name: described.get(name, plain) for name in names.split(", ")}
    return texts


def model_options(model: type) -> dict[str, inspect.Parameter]:
    """The parameters of a model's constructor that the data do not decide, by the name of the option."""
    parameters = inspect.signature(model, eval_str=True).parameters
    return {RENAMED.get(k, k): v for k, v in parameters.items() if k not in runs.decided(model)}


def recipe_options(model: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of an adversarial model's recipe, by the name of the option; none for other models."""
    fields = dataclasses.fields(models.Recipe) if issubclass(model, models.AdversarialModel) else ()
    return {"penalty_weight" if f.name == "weight" else f.name: f for f in fields}


def train_parser(name: str) -> Any:
    """The jsonargparse parser of ``genfast train NAME``."""
    import jsonargparse  # here, since no other command needs it

    model = models.NAMES[name]
    adversarial = issubclass(model, models.AdversarialModel)
    jsonargparse.typing.register_type(number, deserializer=float)
    summary = (inspect.getdoc(model) or "").split("\n\n")[0]
    top = jsonargparse.ArgumentParser(prog=f"genfast train {name}", description=summary, exit_on_error=False)

    def add(group: Any, option: str, kind: Any, default: Any, text: str) -> None:
        kind = {float: number, float | None: number | None}.get(kind, kind)
        how = {"action": jsonargparse.ActionYesNo(no_prefix="no-")} if kind is bool else {"type": kind}
        group.add_argument(f"--{option.replace('_', '-')}", **how, default=default, help=text)

    group = top.add_argument_group("model")
    texts = _descriptions(model)
    for option, parameter in model_options(model).items():
        add(group, option, parameter.annotation, parameter.default, texts.get(parameter.name, ""))
    if issubclass(model, models.AdversarialModel):
        group = top.add_argument_group("recipe, by default that of the model's paper")
        kinds, texts = get_type_hints(models.Recipe), _descriptions(models.Recipe)
        for option, field in recipe_options(model).items():
            kind = str | list[str] | None if field.name == "penalty" else kinds[field.name]
            add(group, option, kind, getattr(model.recipe, field.name), texts.get(field.name, ""))
    group = top.add_argument_group("run")
    points = f"; also {', '.join(data.POINTS)}" if adversarial else ""
    add(group, "config", str, None, "YAML or JSON file with any of these options; the command line wins")
    add(group, "data", str, "digits", f"digits, photos, torchvision:NAME or a folder of images{points}")
    add(group, "root", str, None, "where torchvision's files are")
    if not adversarial:
        add(group, "binary", bool, False, "black and white: 1 where a grey level is in the upper half")
    add(group, "size", int, 32, "side of photo patches and folder images")
    add(group, "background", str, "white", BACKGROUND)
    add(group, "out", str, None, "the run's folder, by default out/MODEL-DATA")
    texts = _descriptions(runs.train)
    for option in RUN_OPTIONS:
        parameter = inspect.signature(runs.train, eval_str=True).parameters[option]
        add(group, option, parameter.annotation, parameter.default, texts[option])
    return top


def _explained(message: str) -> str:
    """An error of jsonargparse about a value, in the form of ours: the argument, what it was and what was expected."""
    key, value = re.search(r'Parser key "(\w+)"', message), re.search(r".*(?:value|to float): (.*)", message, re.DOTALL)
    if key is None or value is None:
        return message
    kinds = re.findall(r"(?:Expected a|Not of type) (.*?)(?:\. Got value.*|: .*)?$", message, re.MULTILINE)
    names = [re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind) for kind in kinds]
    expected = " or ".join(dict.fromkeys(names)).replace("NoneType", "null")
    return f"{key[1]}={value[1].strip(chr(39))!r}, expected {expected}"


def train_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of ``genfast train``: those of the run, and ``model_config`` and ``recipe`` with what was given.

    Raises:
        ValueError: an unknown model, option or key of the config file, or a value of another type.
    """
    if words[:1] and words[0] in ("-h", "--help"):
        print(f"usage: genfast train MODEL [options]\n\nMODEL is one of {', '.join(models.NAMES)}.")
        print("genfast train MODEL --help shows the options of one.")
        raise SystemExit(0)
    if not words or words[0] not in models.NAMES:
        raise ValueError(f"train: model={words[0] if words else None!r}, expected one of {', '.join(models.NAMES)}")
    name, model, top = words[0], models.NAMES[words[0]], train_parser(words[0])
    flags = {word.split("=")[0]: None for word in words[1:] if word.startswith("--")}
    unknown = [flag for flag in flags if not any(flag in action.option_strings for action in top._actions)]
    if unknown:
        decided = all(word[2:].replace("-", "_") in runs.decided(model) for word in unknown)
        raise ValueError(f"train: {name} takes no {', '.join(unknown)}{'; the data decide them' if decided else ''}")
    source = "train: "
    try:
        given = top.parse_args(list(words[1:]), defaults=False).as_dict()
        if "config" in given:
            source += f"--config={given['config']!r}: "
            options = top.parse_path(given["config"], defaults=False).as_dict()
            if "config" in options:
                raise TypeError("Option 'config' is not accepted")
            given = options | given
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(f"{source}{_explained(str(error))}") from error
    a = argparse.Namespace(command="train", model=name, **(top.get_defaults().as_dict() | given))
    a.model_config = {v.name: given[k] for k, v in model_options(model).items() if k in given}
    a.out = None if a.out is None else Path(a.out)
    a.recipe = {f.name: given[k] for k, f in recipe_options(model).items() if k in given}
    if (penalty := a.recipe.get("penalty")) is not None:
        kinds = tuple(penalty.split(",") if isinstance(penalty, str) else penalty)
        a.recipe["penalty"] = None if kinds == ("none",) else kinds[0] if len(kinds) == 1 else kinds
    return a


def _say(text: str) -> None:
    """Prints once however many processes there are."""
    if distributed.first():
        print(text)


def _check_numbers(a: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for counts below 1, and for measures that are not positive and finite."""
    for name in names:
        value = getattr(a, name, None)
        if value is not None and not (0 < value < math.inf):
            expected = "at least 1" if isinstance(value, int) else "a positive number"
            raise ValueError(f"{a.command}: {name}={value}, expected {expected}")


def _train(a: argparse.Namespace) -> int:
    _check_numbers(a, "steps", "minutes", "batch_size", "size", "lr", "generator_lr", "critic_lr")
    runs.check_plots()
    if a.out is not None:  # the default name is the data's
        distributed.on_first(_files.check_folder, a.out, "train: --out")
        distributed.on_first(checkpoints.check_folder, a.out, a.resume)
    model = models.NAMES[a.model]
    adversarial = issubclass(model, models.AdversarialModel)
    if (adversarial or issubclass(model, models.AutoencoderModel)) and a.parallel != "ddp":
        raise ValueError(f"train: {a.model} takes no --parallel {a.parallel}")
    dataset: data.Dataset | data.Points
    if adversarial and a.data in data.POINTS:
        dataset = data.points(a.data, seed=a.seed)
    else:
        images = data.load(a.data, size=a.size, root=a.root, seed=a.seed, background=a.background)
        dataset = data.binarized(images) if not adversarial and a.binary else images
    if a.model == "glow" and min(dataset.shape[1:], default=16) < 16:
        a.model_config.setdefault("levels", 2)  # three need multiples of eight, and leave 8x8 images one position
    out = a.out or Path("out", f"{a.model}-{dataset.name}")
    options = {name: getattr(a, name) for name in RUN_OPTIONS}
    written = runs.train(a.model, dataset, out, config=a.model_config, recipe=a.recipe, **options)
    _say(f"{written['steps']} steps, {_result(written)}; see {out}")
    return 0


def _result(written: dict[str, Any]) -> str:
    """What a run has come to, in words."""
    if "critic_loss" in written:
        text = f"critic {written['critic_loss']:.3f}, generator {written['generator_loss']:.3f}"
        if "covered" in written:
            covered = f", {written['covered']} of {written['modes']} modes"
            text += f"{covered}, {written['within_3']:.1%} of samples within 3 sigma"
        return text
    if "test_mse" not in written:
        return f"{written['test_bits_per_dim']:.3f} bits/dim on held-out images"
    text = "on held-out images "
    if "test_elbo" in written:
        text += (
            f"ELBO {written['test_elbo']:.2f} nats = {written['test_reconstruction']:.2f} - {written['test_kl']:.2f} "
            f"(KL), {written['test_bits_per_dim']:.3f} bits/dim, "
            f"{written['test_importance_weighted_bits_per_dim']:.3f} with {IMPORTANCE_SAMPLES} importance samples, "
        )
    return f"{text}mean squared error {written['test_mse']:.4f}"


def _sample_adversarial(model: models.AdversarialModel, metadata: dict[str, str], a: argparse.Namespace) -> None:
    context = None if a.label is None else torch.full((a.n,), a.label)
    samples = distributed.sample(model, a.n, generator=torch.Generator().manual_seed(a.seed), context=context)
    if distributed.first():
        pictures.draw(samples, a.out, bins=int(metadata["bins"]))


def _sample(a: argparse.Namespace) -> int:
    _check_numbers(a, "n")
    model, metadata, checkpoint = checkpoints.load(a.checkpoint, a.device)
    points = isinstance(model, models.AdversarialModel) and len(model.shape) == 1
    distributed.on_first(_files.check_picture, a.out, "sample: --out", plot=points)
    if isinstance(model, models.AdversarialModel):
        _sample_adversarial(model, metadata, a)
        _say(f"{a.n} samples from step {metadata['step']} in {a.out}")
        return 0
    if a.label is not None:
        raise ValueError(f"sample: {metadata['model']} takes no --label")
    options = {"temperature": a.temperature}
    if isinstance(model, models.AutoregressiveModel):
        options |= {"method": a.method, "progress": distributed.first()}
    shape = model.shape
    if len(shape) < 3:  # a model of vectors or sequences: square grey images
        side = math.isqrt(shape[-1])
        if side * side != shape[-1]:
            raise ValueError(f"sample: {checkpoint} makes vectors of {shape[-1]}, which are no square images")
        shape = (1, side, side)
    images = distributed.sample(model, a.n, generator=torch.Generator().manual_seed(a.seed), **options).reshape(
        -1, *shape
    )
    if distributed.first():
        pictures.save_picture(pictures.image_grid(images, int(metadata["bins"])), a.out)
    _say(f"{a.n} samples from step {metadata['step']} in {a.out}")
    return 0


def _feature_network(a: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """The network that is asked for, and the normalisation that it expects."""
    if a.weights is not None and a.network not in ("vgg16", "vgg19"):
        raise ValueError(f"style: --weights are of --network vgg16 or vgg19, and --network is {a.network!r}")
    file, _, function = a.network.rpartition(":")
    if a.normalization is not None and not file:
        raise ValueError(f"style: --normalization is for --network FILE.py:FUNCTION; that of {a.network!r} is known")
    if a.network == "random":
        return losses.random_features(seed=a.seed), ((0.5,) * 3, (0.25,) * 3)
    if a.network in ("vgg16", "vgg19"):
        if a.weights is None:
            return losses.vgg_features(a.network, "imagenet"), "imagenet"
        if not a.weights.is_file():
            raise FileNotFoundError(f"style: --weights={str(a.weights)!r} is no file")
        try:
            return losses.vgg_features(a.network, a.weights), "imagenet"
        except (SafetensorError, pickle.UnpicklingError, EOFError, LookupError) as error:
            raise ValueError(f"style: --weights={str(a.weights)!r} cannot be read: {error}") from error
    if not file or not Path(file).is_file():
        raise FileNotFoundError(f"style: --network={a.network!r}, expected random, vgg16, vgg19 or FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"style: {file!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ImportError(f"style: {file!r} has no {function!r}")
    return getattr(module, function)(), None if a.normalization == "none" else a.normalization or "imagenet"


def _style(a: argparse.Namespace) -> int:
    from .models import neural_style

    _check_numbers(a, "steps", "size")
    distributed.check_device(a.device)
    _files.check_picture(a.out, "style: --out")
    if a.sheet is not None:
        _files.check_picture(a.sheet, "style: --sheet")
    content, style = (
        neural_style.picture(name, a.size, background=a.background).to(a.device) for name in (a.content, a.style)
    )
    network, normalization = _feature_network(a)
    chosen: dict[str, Any] = {"style_weight": a.style_weight}
    for name in ("content_layers", "style_layers"):
        chosen[name] = None if getattr(a, name) is None else getattr(a, name).split(",")
    if a.network == "random" and a.content_layers is None:
        chosen["content_layers"] = ["relu2_1"]
    if a.style_weight is None and (a.network == "random" or a.loss == "contextual"):
        chosen["style_weight"] = 1.0 if a.loss == "contextual" else 10.0
    result = models.style_transfer(
        content,
        style,
        network.to(a.device),
        normalization=normalization,
        steps=a.steps,
        optimizer=a.optimizer,
        loss=a.loss,
        tv_weight=a.tv_weight,
        init=a.init,
        seed=a.seed,
        progress=True,
        **{k: v for k, v in chosen.items() if v is not None},
    )
    grid = pictures.image_grid(result.image - 0.5, 256, columns=1, scale=1)
    pictures.save_picture(grid.crop((1, 1, grid.width - 1, grid.height - 1)), a.out)
    if a.sheet is not None:
        other = torch.nn.functional.interpolate(style, content.shape[2:], mode="bilinear", antialias=True)
        pictures.save_picture(
            pictures.image_grid(torch.cat((content, other, result.image)) - 0.5, 256, columns=3), a.sheet
        )
    print(f"{a.steps} steps, loss {result.losses[0]:.4g} -> {result.losses[-1]:.4g}; see {a.out}")
    return 0


def _bench(a: argparse.Namespace) -> int:
    if importlib.util.find_spec("benchmarks") is None and not Path("benchmarks", "__main__.py").exists():
        raise FileNotFoundError("bench: the benchmarks are in the source checkout; run this from its top folder")
    return subprocess.run([sys.executable, "-m", "benchmarks", *a.arguments], check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    Errors are one line on standard error and status 2, a run that diverged is one and status 1, and Ctrl-C and SIGTERM
    are one and 128 plus the signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _signals.raised():
            if words[:1] == ["bench"]:  # everything behind it belongs to the suite, options too
                a = argparse.Namespace(command="bench", arguments=words[1:])
            else:
                a = train_arguments(words[1:]) if words[:1] == ["train"] else parser().parse_args(words)
            status = _run(a)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as error:  # SIGTERM too
        if os.environ.get("RANK", "0") == "0":
            print(f"genfast: {str(error) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except BrokenPipeError:  # whoever read this has read enough
        _discard_output()
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
        rank = os.environ.get("RANK", "0")  # of the processes that torchrun started
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"genfast: {'' if rank == '0' else f'rank {rank}: '}error: {said}", file=sys.stderr)
        if isinstance(error, OSError):
            _discard_output()
        return 1 if isinstance(error, TrainingError) else 2


def _discard_output() -> None:
    """Keeps what cannot be written to standard output from failing once more when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(a: argparse.Namespace) -> int:
    """One command; its exit status."""
    if a.command == "info":
        _info.print_info()
        return 0
    if a.command == "verify":
        if a.json is not None:
            _files.check_file(a.json, "verify: --json")
        options = dict(odd_shapes=a.odd, jobs=a.jobs, minutes=a.minutes, json_path=a.json)
        return _verify.run(a.op, a.device, a.dtype, a.seed, **options)
    if a.command == "demo":
        from .training import demo

        _check_numbers(a, "seconds")
        runs.check_plots()
        _files.check_folder(a.out, "demo: --out")
        return demo.run(a.out, a.seconds)
    if a.command in ("train", "sample"):
        with distributed.start(a.device) as a.device:
            return {"train": _train, "sample": _sample}[a.command](a)
    return {"bench": _bench, "style": _style}[a.command](a)
