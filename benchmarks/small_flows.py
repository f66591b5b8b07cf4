"""Training steps and densities of the small flows that people train, beside zuko's and, jitted, flowjax's.

    python -m benchmarks.small_flows [--rounds 5] [--python JAX_PYTHON] [--out FILE.json]

Each library runs in processes of its own, in turn, since PyTorch's and JAX's thread pools disturb each other. A step is
log_prob, backward and Adam: torch's default, fused and genfast's, and optax's in one jitted function with the loss and
the gradient. The least of each process's times is taken, and of these the median over the rounds. JAX may live in
another environment, named by --python; where flowjax is not installed its columns are empty.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Flow(NamedTuple):
    """A flow and its batch."""

    kind: str  # maf, nsf (autoregressive) or coupling (nsf)
    features: int
    context: int
    hidden: int
    transforms: int
    batch: int


FLOWS = {
    "MAF 5 x (50, 50), 5 features, 10 of context, batch 200": Flow("maf", 5, 10, 50, 5, 200),
    "MAF 3 x (64, 64), 16 features, batch 256": Flow("maf", 16, 0, 64, 3, 256),
    "NSF 5 x (50, 50), 5 features, 10 of context, batch 200": Flow("nsf", 5, 10, 50, 5, 200),
    "NSF 3 x (64, 64), 16 features, batch 256": Flow("nsf", 16, 0, 64, 3, 256),
    "coupling NSF 5 x (50, 50), 5 features, 10 of context, batch 200": Flow("coupling", 5, 10, 50, 5, 200),
    "MAF 5 x (512, 512), 64 features, batch 256": Flow("maf", 64, 0, 512, 5, 256),
}
PROVIDERS = ("zuko", "zuko accelerated", "genfast", "flowjax")
STEPS = ("default Adam", "fused Adam", "genfast's Adam", "log_prob")


def shortest(call: Callable[[], Any], seconds: float) -> float:
    """The least time of a call, in milliseconds."""
    for _ in range(3):
        call()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least * 1e3


def _torch_times(provider: str, flow: Flow, seconds: float) -> dict[str, float]:
    import torch

    import genfast

    torch.set_num_threads(2)
    torch.manual_seed(0)
    x = torch.randn(flow.batch, flow.features)
    context = torch.randn(flow.batch, flow.context) if flow.context else None
    model: Any
    if provider == "genfast":
        options: dict[str, Any] = dict(hidden=flow.hidden, transforms=flow.transforms, context=flow.context, norm=None)
        if flow.kind == "maf":
            model = genfast.models.MAF(flow.features, **options)
        else:
            coupling: Any = "coupling" if flow.kind == "coupling" else "autoregressive"
            model = genfast.models.NSF(flow.features, coupling=coupling, **options)
        log_prob = lambda: model.log_prob(x, context)
    else:
        import zuko

        hidden = (flow.hidden, flow.hidden)
        options = dict(context=flow.context, transforms=flow.transforms, hidden_features=hidden)
        if flow.kind == "maf":
            model = zuko.flows.MAF(flow.features, **options)
        else:
            more = {"passes": 2} if flow.kind == "coupling" else {}
            model = zuko.flows.NSF(flow.features, **options, **more)
        if provider == "zuko accelerated":
            genfast.accelerate(model)
        log_prob = lambda: model(context).log_prob(x)
    parameters = list(model.parameters())
    times = {}
    for name, optimizer in (
        ("default Adam", torch.optim.Adam(parameters, 1e-6)),
        ("fused Adam", torch.optim.Adam(parameters, 1e-6, fused=True)),
        ("genfast's Adam", genfast.optim.Adam(parameters, 1e-6)),
    ):

        def step(optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            (-log_prob().mean()).backward()
            optimizer.step()

        times[name] = shortest(step, seconds)
    with torch.no_grad():
        times["log_prob"] = shortest(log_prob, seconds)
    return times


def _jax_times(flow: Flow, seconds: float) -> dict[str, float]:
    import equinox as eqx  # type: ignore[import-not-found]
    import jax  # type: ignore[import-not-found]
    import jax.numpy as jnp  # type: ignore[import-not-found]
    import optax  # type: ignore[import-not-found]
    import paramax  # type: ignore[import-not-found]
    from flowjax.bijections import RationalQuadraticSpline  # type: ignore[import-not-found]
    from flowjax.distributions import Normal  # type: ignore[import-not-found]
    from flowjax.flows import coupling_flow, masked_autoregressive_flow  # type: ignore[import-not-found]

    options: dict[str, Any] = dict(
        base_dist=Normal(jnp.zeros(flow.features)),
        cond_dim=flow.context or None,
        flow_layers=flow.transforms,
        nn_width=flow.hidden,
        nn_depth=2,
    )
    if flow.kind != "maf":
        options["transformer"] = RationalQuadraticSpline(knots=8, interval=5)
    make = coupling_flow if flow.kind == "coupling" else masked_autoregressive_flow
    model = make(jax.random.key(0), **options)
    x = jax.random.normal(jax.random.key(1), (flow.batch, flow.features))
    given = (jax.random.normal(jax.random.key(2), (flow.batch, flow.context)),) if flow.context else ()
    parameters, static = eqx.partition(
        model, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer = optax.adam(1e-6)

    def log_prob(parameters: Any) -> Any:
        return paramax.unwrap(eqx.combine(parameters, static)).log_prob(x, *given)

    @jax.jit
    def update(parameters: Any, state: Any) -> Any:
        gradients = jax.grad(lambda p: -log_prob(p).mean())(parameters)
        changes, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, changes), state

    held = [parameters, optimizer.init(parameters)]

    def step() -> None:
        held[:] = update(*held)
        jax.block_until_ready(held)

    density = jax.jit(log_prob)
    return {
        "default Adam": shortest(step, seconds),
        "log_prob": shortest(lambda: density(parameters).block_until_ready(), seconds),
    }


def _measured(provider: str, name: str, seconds: float, jax_python: str) -> dict[str, float] | None:
    """One process's times, or None where the library is not there."""
    command = [jax_python if provider == "flowjax" else sys.executable, __file__, "--one", provider, name, str(seconds)]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads=2",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        if "ModuleNotFoundError" in done.stderr:
            return None
        raise RuntimeError(f"small_flows: {provider} failed on {name}:\n{done.stderr[-2000:]}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def rows(results: dict[str, dict[str, dict[str, float]]]) -> Iterator[list[str]]:
    """A line a flow: our times, and how many times faster than the others' that is."""
    for name, of in results.items():

        def ratio(provider: str, theirs: str, mine: str, by: str = "genfast", of: Any = of) -> str:
            if provider not in of or by not in of:
                return "-"
            return f"{of[provider][theirs] / of[by][mine]:.2f}x"

        accelerated = "zuko accelerated"
        yield [
            name,
            f"{of['genfast'][STEPS[2]]:.2f}",
            ratio("zuko", STEPS[0], STEPS[2]),
            ratio("zuko", STEPS[1], STEPS[2]),
            ratio("flowjax", STEPS[0], STEPS[2]),
            ratio("zuko", STEPS[0], STEPS[0], accelerated),
            ratio("zuko", STEPS[0], STEPS[2], accelerated),
            ratio("zuko", "log_prob", "log_prob"),
            ratio("flowjax", "log_prob", "log_prob"),
        ]


HEADERS = (
    "flow", "step,\nms", "over zuko,\ndefault Adam", "over zuko,\nfused Adam", "over\nflowjax",
    "zuko accelerated,\nits Adam", "zuko accelerated,\nour Adam", "log_prob\nover zuko", "log_prob\nover flowjax",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each library for each flow")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time in a process")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has flowjax")
    parser.add_argument("--out", type=Path, help="a JSON file for the times")
    parser.add_argument("--one", nargs=3, metavar=("PROVIDER", "FLOW", "SECONDS"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:  # in an environment that may hold JAX alone
        provider, name, seconds = a.one
        flow = FLOWS[name]
        times = (
            _jax_times(flow, float(seconds)) if provider == "flowjax" else _torch_times(provider, flow, float(seconds))
        )
        print(json.dumps(times))
        return
    from tabulate import tabulate

    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in FLOWS:
        found: dict[str, list[dict[str, float]]] = {p: [] for p in PROVIDERS}
        for _ in range(a.rounds):
            for provider in PROVIDERS:
                times = _measured(provider, name, a.seconds, a.python)
                if times is not None:
                    found[provider].append(times)
        results[name] = {
            p: {key: statistics.median(t[key] for t in of) for key in of[0]} for p, of in found.items() if of
        }
        print(f"{name}: done", file=sys.stderr, flush=True)
    print(tabulate(list(rows(results)), HEADERS, tablefmt="github", disable_numparse=True))
    if a.out is not None:
        from genfast._files import write_text

        write_text(a.out, json.dumps({"unit": "ms", "threads": 2, "flows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
