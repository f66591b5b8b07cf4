"""ops.gradient_penalty and ops.critic_step: the penalty on a critic's input gradient without double backward.

In eager mode the value is given its gradients directly; under torch.compile both are one op (``compiled_step.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops import _check
from ..reference.adversarial import CRITIC_LOSSES
from ..reference.gradient_penalty import KINDS
from .batch_penalty import penalty_at_points
from .compiled_step import compiled_step, number_of
from .eager_step import eager_step
from .penalty_value import check_finite
from .processes import as_one_forward, as_one_forward_uncompiled, norms_uncompiled, patches_uncompiled, traceable
from .settings import BATCHING, METHODS, PATCHES, RANDOM, Call, Contexts, Critic, CriticLoss, Output, Penalty, Settings


def _context(op: str, name: str, context: Contexts) -> tuple[Tensor, ...]:
    found = () if context is None else (context,) if isinstance(context, Tensor) else tuple(context)
    for c in found:
        if not isinstance(c, Tensor):
            raise TypeError(f"{op}: {name} holds a {type(c).__name__}, expected tensors")
    return found


def _check_inputs(
    call: Call, critic: Any, real: Any, fake: Any, kind: str | None, method: str, function: Any, sigma: float
) -> None:
    op = call.op
    if not callable(critic):
        raise TypeError(f"{op}: critic is a {type(critic).__name__}, expected a callable of (x, *context)")
    name = "penalty" if op == "critic_step" and function is None else "kind"
    if kind is not None:
        _check.choice(op, name, kind, KINDS)
    if function is not None:
        if not callable(function):
            raise TypeError(
                f"{op}: penalty is a {type(function).__name__}, expected a function of the gradient (N, ...)"
            )
        if kind == "ar1":
            raise ValueError(
                f"{op}: kind='ar1' takes no gradient that penalty could be a function of, expected another kind"
            )
    _check.choice(op, "method", method, METHODS)
    if call.output is not None and (
        isinstance(call.output, bool) or not (isinstance(call.output, (int, str)) or callable(call.output))
    ):
        raise TypeError(f"{op}: output is a {type(call.output).__name__}, expected an index, a key or a function")
    if call.patches is not None:
        _check.choice(op, "patches", call.patches, PATCHES)
    if kind == "ar1" and not sigma > 0:
        raise ValueError(f"{op}: sigma={sigma}, expected a positive number")
    _check.floating(op, real=real, fake=fake)
    needs = kind in ("wgan-gp", "wgan-lp", "r2", "r1r2")
    if fake is None and needs:
        raise ValueError(f"{op}: fake is None, and {name}={kind!r} needs it")
    for name, x in (("real", real), ("fake", fake)):
        if x is not None and (x.dim() < 1 or x.shape[0] == 0):
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (N, ...) with at least one sample")
    if fake is not None and kind in ("wgan-gp", "wgan-lp") and (fake.shape != real.shape or fake.dtype != real.dtype):
        raise ValueError(
            f"{op}: fake has shape {tuple(fake.shape)} and dtype {fake.dtype}, expected those of real: "
            f"{tuple(real.shape)}, {real.dtype} (each sample is interpolated with one of the other)"
        )


def _numbers(op: str, weight: Any, target: Any, function: Penalty | None) -> tuple[float, float]:
    """The weight, by default 10, or 1 for a penalty of the user's own, and the target."""
    for name, x in (("weight", weight), ("target", target)):
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{op}: {name} requires a gradient, and none would reach it; multiply the result by it, or give "
                "penalty= a function that uses it"
            )
    return float((10.0 if function is None else 1.0) if weight is None else weight), float(target)


def _random_points(
    op: str,
    real: Tensor,
    fake: Tensor | None,
    kind: str,
    generator: Any,
    epsilon: Tensor | None,
    points: Tensor | None,
    sigma: float,
) -> Tensor:
    """What :func:`reference.penalty_points` draws, or ``points``."""
    if points is None:
        if epsilon is not None and kind in RANDOM:
            if kind not in ("wgan-gp", "wgan-lp"):
                raise ValueError(
                    f"{op}: epsilon was given, and {kind!r} interpolates nothing, expected wgan-gp or wgan-lp"
                )
            _check.floating(op, real=real, epsilon=epsilon)
            if epsilon.numel() != real.shape[0]:
                raise ValueError(
                    f"{op}: epsilon has shape {tuple(epsilon.shape)}, expected one number per sample: "
                    f"({real.shape[0]},); other points go in points="
                )
            epsilon = epsilon.to(real.dtype)
        return reference.penalty_points(real, fake, kind, generator, epsilon, sigma)
    if kind not in RANDOM:
        raise ValueError(f"{op}: points were given, and {kind!r} draws none, expected a penalty of {', '.join(RANDOM)}")
    _check.floating(op, points=points)
    if points.shape != real.shape or points.dtype != real.dtype:
        raise ValueError(
            f"{op}: points have shape {tuple(points.shape)} and dtype {points.dtype}, expected those of real: "
            f"{tuple(real.shape)}, {real.dtype}"
        )
    return points


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor | None = None,
    *,
    kind: str = "wgan-gp",
    weight: float | None = None,
    target: float = 1.0,
    context: Contexts = None,
    fake_context: Contexts = None,
    epsilon: Tensor | None = None,
    points: Tensor | None = None,
    generator: torch.Generator | None = None,
    method: str = "auto",
    sigma: float = 0.01,
    return_norms: bool | str = False,
    penalty: Penalty | None = None,
    output: Output = None,
    patches: str | None = None,
) -> Any:
    """The penalty on a critic's input gradient, with its exact gradients, in first-order work.

    With g_n the gradient of the sum of the critic's outputs by sample n, and ||.|| over all but the batch axis:

    - "wgan-gp": weight mean (||g|| - target)^2 at eps real + (1 - eps) fake, one eps ~ U[0, 1] a sample
        (arXiv:1704.00028);
    - "wgan-lp": weight mean max(0, ||g|| - target)^2 at the same points (arXiv:1709.08894);
    - "r1", "r2": weight / 2 mean ||g||^2 on real, or on fake (arXiv:1801.04406); "r1r2" their sum (arXiv:2501.05441);
    - "dragan": as wgan-gp at real + a std(real) U / 2 (arXiv:1705.07215);
    - "ar1": weight mean (D(x) - D(x + sigma noise))^2 on real (arXiv:2501.08316), first order in everything, an
        estimate of
      R1 whose weight is gamma / (2 sigma^2).

    Args:
        critic: a module, or any callable, of (x, *context) that returns one value per sample, (N,), (N, 1), ..., or
            what ``output`` and ``patches`` make that of.
        real, fake: (N, ...) floating point. Gradients go to those that require them.
        weight: lambda, or gamma for R1 and R2; by default 10, and 1 with ``penalty``.
        context: a tensor or several, given to the critic after x; for "r2", of fake.
        fake_context: what goes with fake in "r1r2"; ``context`` by default.
        epsilon: (N,), instead of random ones.
        points: (N, ...), those of the penalties that draw some, instead of random ones: eps real + (1 - eps) fake, or
            real + sigma noise for "ar1".
        generator: draws the random numbers.
        method: "exact" by the rules of ``genfast.penalty``, or an error that says what has none; "finite-difference",
            two more passes forward and back, for critics of opaque kernels (error about 1e-4 in float32); "autograd",
            PyTorch's double backward; "auto" takes the first of exact, autograd and finite-difference that works, and
            warns if that is not the first. The first call that meets a function without a rule of ours, or a
            checkpoint, compares the exact form with double backward, and takes the latter where they differ.
            ``genfast.explain(critic)`` prints the rule of each part.
        sigma: the step of "ar1".
        return_norms: also returns the norms, (N,). They carry a gradient, so that a loss may be made of them; to find
            it, their backward pass runs the critic once more, from the buffers and random numbers that this call met.
            "detached": without one.
        penalty: a penalty of your own, in place of that of ``kind``, which then says only where the gradient is taken:
            a function of g (N, ...), in float32 or better, that returns (N,), of which the mean is taken, or a scalar.
            It may use other tensors that require a gradient (a multiplier that is learnt). WGAN-div (arXiv:1712.01026)
            is ``kind="r1r2", penalty=lambda g: k / 2 * g.flatten(1).square().sum(1) ** (p / 2)``; with norms by pixel
            it is ``lambda g: (g.norm(dim=1) - 1).square().flatten(1).mean(1)``.
        output: what to take of a critic that returns several things: an index of a tuple or list, a key of a mapping
            (or the name of an attribute), or a function of what it returned.
        patches: for critics with several outputs a sample, such as PatchGAN's (N, 1, h, w): "sum", as
            autograd.grad with ones for grad_outputs takes it, or "mean". With "sum" what ``output`` takes may also be a
            tuple or list of tensors, of several scales.

    Returns:
        (), float32 or better, or (penalty, norms). Differentiable once; its gradient is exact where activations are
        differentiable, and takes the subgradients that autograd takes elsewhere. Where ||g|| = 0 it is zero.

    Layers that couple samples (batch norm in training, minibatch deviation) get the gradient of the summed outputs,
    which is what double backward gives too, and a warning. Under torch.autocast products run in bfloat16; under a
    float16 autocast the penalty runs in float32, so that no loss scale is needed inside it: scale the total loss as
    usual.

    Random numbers are drawn as by the plain code: those of the points first, then the critic's own in one forward pass,
    so that dropout masks are the same for the same seed. Passes beside that one (finite differences, a first one that
    turned out not to do) meet the same numbers, and leave none drawn.

    Over several processes give the critic as it is wrapped in DistributedDataParallel: this is one forward pass to it
    (in torch.compile without graph breaks only if it looks for no unused parameters). Or call this in the forward of a
    module that is wrapped, or sharded by fully_shard as a whole. The value is the mean over this rank's samples; ranks
    with equally many then get the gradient of one process on all of them, given the same points. Where samples are
    coupled they are so within a
    rank: through layers, and in "dragan", whose std is that of this rank's ``real`` (give it ``points`` of the whole
        batch).

    Raises:
        TypeError, ValueError: arguments that do not fit, critics that return anything but one value per sample (the
            message names ``output`` or ``patches``), critics that are sharded apart from the module that calls this.
        RuntimeError: finite differences of a critic that does not repeat its outputs with its buffers and random
            numbers put back; a second derivative.
        FloatingPointError: norms that are not finite, on this rank; on a GPU, which is not waited for, the value is not
            finite either.
        genfast.penalty.Unsupported: with method="exact".

    Source: Gulrajani et al. 2017 (arXiv:1704.00028, section 4); Etmann 2019 (arXiv:1906.06637) for the work it takes.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> genfast.ops.gradient_penalty(critic, torch.randn(32, 2), torch.randn(32, 2)).backward()
    """
    call = Call("gradient_penalty", output, patches)
    op = call.op
    _check_inputs(call, critic, real, fake, kind, method, penalty, sigma)
    if not isinstance(return_norms, bool):
        _check.choice(op, "return_norms", return_norms, ("detached",))
    s = Settings(kind, *_numbers(op, weight, target, penalty), method, float(sigma), penalty)
    first = _context(op, "context", context)
    second = first if fake_context is None else _context(op, "fake_context", fake_context)
    if kind == "r1r2" and points is None:
        assert fake is not None
        at, contexts = [real, fake], (first, second)
    else:
        at, contexts = [_random_points(op, real, fake, kind, generator, epsilon, points, sigma)], (first, ())
        if kind == "ar1":
            at.insert(0, real)
    differentiable = return_norms is True
    compiling = torch.compiler.is_compiling()
    if compiling and kind != "ar1" and traceable(critic) and not differentiable:
        step = compiled_step(call, critic, at, contexts, -1, s)
        value, norms = step.loss, step.norms
    else:
        count = len(at)

        def run(module: Critic, *moved: Tensor) -> tuple[Tensor, Tensor]:
            sets = moved[count : count + len(contexts[0])], moved[count + len(contexts[0]) :]
            value, norms = penalty_at_points(call, module, moved[:count], sets, s, differentiable)
            check_finite(op, value, norms)
            return value, norms if differentiable else norms.detach()

        whole = as_one_forward
        if compiling and kind != "ar1":
            whole = as_one_forward_uncompiled if not traceable(critic) else norms_uncompiled
        value, norms = whole(op, critic, run, *at, *contexts[0], *contexts[1])
    return (value, norms) if return_norms else value


def critic_step(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "wasserstein",
    penalty: str | Penalty | None = "wgan-gp",
    weight: float | None = None,
    target: float = 1.0,
    context: Contexts = None,
    fake_context: Contexts = None,
    epsilon: Tensor | None = None,
    points: Tensor | None = None,
    generator: torch.Generator | None = None,
    method: str = "auto",
    sigma: float = 0.01,
    batching: str = "auto",
    kind: str | None = None,
    output: Output = None,
    patches: str | None = None,
) -> CriticLoss:
    """A critic's whole loss, adversarial and penalty together, for one pass over real, fake and interpolated samples.

    A weight's gradient is one product for loss and penalty on the same samples, and R1 costs about one forward pass
    more than the loss alone.

    Args:
        critic, real, fake, weight, target, epsilon, points, generator, method, sigma, output: as in
        :func:`gradient_penalty`.
        loss: a key of ``genfast.losses.CRITIC_LOSSES`` ("wasserstein", "hinge", "minimax", "lsgan", "relativistic",
            ...), or a function of (real_logits, fake_logits), each (N,), that returns a scalar to be minimised by the
            critic.
        penalty: a kind of :func:`gradient_penalty`, or None, or a penalty of your own as there.
        kind: where a penalty of your own takes the gradient, "wgan-gp" by default.
        batching: "apart": real, fake and interpolated samples are batches of their own. "together": they go through the
            critic as one batch. "auto" joins them on a GPU, and on a CPU those without a penalty, which takes less
            memory and time; it joins none in a critic that draws random numbers or changes its buffers, so that each
            batch meets what it meets in plain code. Batches are joined only where the record of a pass shows nothing
            that mixes samples, and only after the outputs of one joined batch have equalled those of separate ones, for
            each structure of the record and each batch size; else "together" warns, and they go apart.
        patches: as in :func:`gradient_penalty` for the penalty. The loss then takes all outputs, (N, ...): the ones of
            this library are means over samples and patches.
        context, fake_context: given to the critic after real (and interpolated) and after fake samples.

    Returns:
        CriticLoss; call ``.loss.backward()``.

    What the critic does once per forward (a power iteration, dropout masks) it does once a batch: in the order points
    of the penalty drawn, real, fake, penalty. With "apart", and for such critics with "auto", that is what plain code
    does which draws the points first and calls the critic on these three; on the samples of "r1", "r2" and "r1r2" loss
    and penalty share one pass, and so one mask. Over several processes see
    :func:`gradient_penalty`; "relativistic-average" compares with means over this rank's logits.

    Raises:
        TypeError, ValueError, FloatingPointError: as in :func:`gradient_penalty`.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> step = genfast.ops.critic_step(critic, torch.randn(32, 2), torch.randn(32, 2), loss="hinge", penalty="r1")
        >>> step.loss.backward()
    """
    call = Call("critic_step", output, patches)
    op = call.op
    function = None if penalty is None or isinstance(penalty, str) else penalty
    if function is None and kind is not None:
        raise ValueError(
            f"{op}: kind={kind!r} is where a penalty of your own takes the gradient, and penalty={penalty!r}"
        )
    kind = penalty if penalty is None or isinstance(penalty, str) else kind or "wgan-gp"
    _check_inputs(call, critic, real, fake, kind, method, function, sigma)
    if fake is None:
        raise ValueError(f"{op}: fake is None, expected the generator's samples")
    _check.choice(op, "batching", batching, BATCHING)
    if isinstance(loss, str):
        _check.choice(op, "loss", loss, CRITIC_LOSSES)
        loss = CRITIC_LOSSES[loss]
        if loss is CRITIC_LOSSES["relativistic"] and len(fake) != len(real):  # one of them would be broadcast
            raise ValueError(
                f"{op}: fake has {len(fake)} samples and real {len(real)}, and loss='relativistic' compares them one "
                "by one, expected equal numbers"
            )
    elif not callable(loss):
        raise TypeError(
            f"{op}: loss is a {type(loss).__name__}, expected a name or a function of (real_logits, fake_logits)"
        )
    first = _context(op, "context", context)
    contexts = (first, first if fake_context is None else _context(op, "fake_context", fake_context))
    s = (
        None
        if kind is None
        else Settings(kind, *_numbers(op, weight, target, function), method, float(sigma), function)
    )
    drawn: tuple[Tensor, ...] = ()
    if kind in RANDOM or points is not None:
        drawn = (_random_points(op, real, fake, str(kind), generator, epsilon, points, sigma),)
    compiling = torch.compiler.is_compiling()
    if compiling and traceable(critic) and patches is None:
        return compiled_step(call, critic, [real, fake, *drawn], contexts, number_of(loss), s, batching)

    def run(module: Critic, real: Tensor, fake: Tensor, *moved: Tensor) -> CriticLoss:
        at, rest = (moved[0], moved[1:]) if drawn else (None, moved)
        return eager_step(call, module, real, fake, at, (rest[: len(first)], rest[len(first) :]), loss, s, batching)

    whole = as_one_forward
    if compiling:
        whole = as_one_forward_uncompiled if not traceable(critic) else patches_uncompiled
    result: CriticLoss = whole(op, critic, run, real, fake, *drawn, *contexts[0], *contexts[1])
    return result
