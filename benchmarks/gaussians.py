"""``python -m benchmarks.gaussians``: WGAN-GP on 25 Gaussians, with genfast's critic step and plain PyTorch's, in
turns.

The setting of the released gan_toy.py (arXiv:1704.00028): perceptrons of three times 512 ReLU units, batch 256, a
penalty of weight 0.1, five updates of the critic for one of the generator, Adam 1e-4 (0.5, 0.9). Both start from the
same weights and draw the same batches, latents and interpolation; only the critic's update differs. A vanilla GAN of
the same networks runs beside them. The three take turns of a few seconds on the same threads, so that a drift of the
machine meets all alike, and each has its own clock, which stands still while the others train and while samples are
scored.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.__main__ import HERE, environment, slug, write
from genfast import data, metrics, models, ops, reference

BATCH, WEIGHT, CRITIC_STEPS = 256, 0.1, 5
SAMPLES, MINIMUM = 10_000, 20  # a mode is covered by a twentieth of its share of the samples
QUALITIES = ("nearest", "covered", "within_3", "within_4", "kl")
COLOURS = {"genfast": "#2a9d5c", "plain PyTorch": "#888888", "vanilla GAN": "#d08a2e"}

CriticLoss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def ours(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    return ops.critic_step(
        critic, real, fake, loss="wasserstein", penalty="wgan-gp", weight=WEIGHT, generator=generator
    ).loss


def plain(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    """As the well-known scripts write it."""
    alpha = torch.rand(len(real), 1, generator=generator)
    at = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(at).sum(), at, create_graph=True)
    penalty = WEIGHT * ((gradient.norm(2, dim=1) - 1) ** 2).mean()
    return critic(fake).mean() - critic(real).mean() + penalty


def vanilla(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor:
    return reference.CRITIC_LOSSES["nonsaturating"](critic(real), critic(fake))


def nearest(samples: Tensor, points: data.Points) -> float:
    """Median distance of a sample to its nearest centre, in standard deviations: it falls long before samples are good.

    1.18 for the data themselves.
    """
    assert points.centres is not None
    return float(torch.cdist(samples, points.centres).min(1).values.median()) / points.std


class Run:
    """One contender: its networks, its clock, and what it has reached."""

    def __init__(
        self,
        points: data.Points,
        model: models.WGANGP,
        critic_loss: CriticLoss,
        loss: str,
        critic_steps: int,
        lr: float,
    ) -> None:
        self.points, self.critic_loss, self.critic_steps = points, critic_loss, critic_steps
        self.model = copy.deepcopy(model)
        self.generator_loss = reference.GENERATOR_LOSSES[loss]
        self.random = torch.Generator().manual_seed(0)
        self.optimizers = [
            torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
            for part in (self.model.critic, self.model.generator)
        ]
        self.seconds, self.iterations = 0.0, 0
        self.curve: list[dict[str, float]] = []

    def iteration(self) -> None:
        critic, generator = self.model.critic, self.model.generator
        for _ in range(self.critic_steps):
            real = self.points.train[torch.randint(len(self.points.train), (BATCH,), generator=self.random)]
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, 2, generator=self.random))
            loss = self.critic_loss(critic, real, fake, self.random)
            self.optimizers[0].zero_grad()
            loss.backward()
            self.optimizers[0].step()
        critic.requires_grad_(False)
        loss = self.generator_loss(critic(generator(torch.randn(BATCH, 2, generator=self.random))))
        self.optimizers[1].zero_grad()
        loss.backward()
        self.optimizers[1].step()
        critic.requires_grad_(True)
        self.iterations += 1

    def train(self, seconds: float) -> None:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            self.iteration()
        self.seconds += time.perf_counter() - start

    def draw(self) -> Tensor:
        return self.model.sample(SAMPLES, generator=torch.Generator().manual_seed(1))

    def score(self) -> None:
        assert self.points.centres is not None
        drawn = self.draw()
        scores = metrics.mode_scores(drawn, self.points.centres, self.points.std, minimum=MINIMUM)
        at = {"seconds": self.seconds, "iterations": self.iterations, "nearest": nearest(drawn, self.points)}
        self.curve.append(at | scores._asdict())


def reached(curve: list[dict[str, float]], level: float) -> float | None:
    """Training seconds until three scores in a row have at most this ``nearest``; None if they never do."""
    for i in range(len(curve) - 2):
        if all(at["nearest"] <= level for at in curve[i : i + 3]):
            return curve[i]["seconds"]
    return None


def run(minutes: float, turn: float, hidden: int, lr: float) -> tuple[dict[str, Any], dict[str, Run]]:
    """Trains the three in turns until each has had ``minutes``; the results, and the runs."""
    from tqdm import tqdm

    points = data.points("25gaussians")
    torch.manual_seed(0)
    model = models.WGANGP((2,), hidden=hidden)
    runs = {
        "genfast": Run(points, model, ours, "wasserstein", CRITIC_STEPS, lr),
        "plain PyTorch": Run(points, model, plain, "wasserstein", CRITIC_STEPS, lr),
        "vanilla GAN": Run(points, model, vanilla, "nonsaturating", 1, lr),
    }
    for _ in range(3):
        for each in runs.values():
            each.iteration()  # the first ones start threads; they do not count
    weights = [nn.utils.parameters_to_vector(each.model.critic.parameters()).detach() for each in runs.values()]
    apart = float((weights[0] - weights[1]).norm() / weights[1].norm())  # rounding alone, so early
    for each in runs.values():
        each.iterations = 0
    for each in runs.values():
        each.score()
    bar = tqdm(total=round(60 * minutes), unit="s", disable=not sys.stderr.isatty(), desc="training seconds of each")
    names = list(runs)
    while min(each.seconds for each in runs.values()) < 60 * minutes:
        for name in names:
            runs[name].train(turn)
        names.append(names.pop(0))  # nobody is always first
        for each in runs.values():
            each.score()
        bar.n = min(bar.total, round(runs["genfast"].seconds))
        at = runs["genfast"].curve[-1]
        bar.set_postfix_str(
            f"{at['nearest']:.1f} sigma away, {at['covered']} modes, {at['within_3']:.0%} within 3 sigma"
        )
    bar.close()
    found = {
        name: {
            "iterations_per_second": each.iterations / each.seconds,
            "curve": each.curve,
            "final": {key: statistics.median(at[key] for at in each.curve[-5:]) for key in QUALITIES},
        }
        for name, each in runs.items()
    }
    results = {
        "environment": environment("cpu"),
        "minutes_each": minutes,
        "seconds_a_turn": turn,
        "hidden": hidden,
        "lr": lr,
        "batch": BATCH,
        "penalty_weight": WEIGHT,
        "critic_steps": CRITIC_STEPS,
        "samples": SAMPLES,
        "minimum": MINIMUM,
        "weights_apart_after_3_iterations": apart,
        "runs": found,
    }
    return results, runs


def table(results: dict[str, Any]) -> str:
    """What each has reached in its own time, and how soon."""
    plain_curve = results["runs"]["plain PyTorch"]["curve"]
    levels = [plain_curve[int(share * (len(plain_curve) - 1))]["nearest"] for share in (0.25, 0.5, 0.75)]
    rows = []
    for name, one in results["runs"].items():
        final, soon = one["final"], [reached(one["curve"], level) for level in levels]
        rows.append(
            [
                name,
                f"{one['iterations_per_second']:.1f}",
                f"{final['nearest']:.1f}",
                f"{final['covered']:.0f}",
                f"{final['within_3']:.1%}",
                f"{final['within_4']:.1%}",
                f"{final['kl']:.3f}",
                *("" if s is None else f"{s:.0f}" for s in soon),
            ]
        )
    heads = [
        f"{60 * results['minutes_each']:.0f} s each",
        "iterations/s",
        "nearest",
        "modes",
        "3 sigma",
        "4 sigma",
        "KL",
        *(f"s to {level:.1f}" for level in levels),
    ]
    fast, slow = (results["runs"][name]["iterations_per_second"] for name in ("genfast", "plain PyTorch"))
    return tabulate(rows, headers=heads, disable_numparse=True) + f"\niterations in the same time: {fast / slow:.2f}x"


def plot(results: dict[str, Any], runs: dict[str, Run], path: Path) -> None:
    """Modes and good samples over each one's own time and over iterations; below, what each draws at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(17, 8.5), layout="constrained")
    for i, (key, x, label) in enumerate(
        (
            ("nearest", "seconds", "median distance to a centre, in sigma"),
            ("within_3", "seconds", "share of samples within 3 sigma"),
            ("covered", "seconds", "modes covered, of 25"),
            ("nearest", "iterations", "median distance to a centre, in sigma"),
        )
    ):
        for name, one in results["runs"].items():
            curve = one["curve"]
            axes[0, i].plot([at[x] for at in curve], [at[key] for at in curve], color=COLOURS[name], label=name)
        axes[0, i].set(
            xlabel="its own training seconds" if x == "seconds" else "updates of the generator", ylabel=label
        )
        axes[0, i].grid(alpha=0.3)
        if key == "nearest":
            axes[0, i].set_yscale("log")
    axes[0, 0].legend()
    drawn = {f"{name}, {each.iterations} iterations": (each.draw(), COLOURS[name]) for name, each in runs.items()}
    drawn["data"] = (runs["genfast"].points.test, "black")
    for axis, (title, (samples, colour)) in zip(axes[1], drawn.items()):
        axis.scatter(samples[:4000, 0], samples[:4000, 1], s=1, color=colour, linewidths=0)
        axis.set(title=title, xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    figure.suptitle(
        f"WGAN-GP on 25 Gaussians, {results['environment']['device']}, {results['environment']['threads']} threads"
    )
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gaussians", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each of the three (default 5)")
    parser.add_argument("--turn", type=float, default=4.0, help="seconds of one turn (default 4)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    results, runs = run(a.minutes, a.turn, a.hidden, a.lr)
    name = f"gaussians-{slug(results['environment']['device'])}"
    write(a.out / f"{name}.json", results)
    plot(results, runs, a.out / f"{name}.png")
    print(table(results))
    print(f"in {a.out / name}.json and .png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
