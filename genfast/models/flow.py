"""A flow from any base density and any bijections, and the same as a torch.distributions.Distribution."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.kl import register_kl

from ..nn.flow_lowering import lower
from ..programs import FlowBuilder
from .base_flow import FlowModel


def _moved(value: Any, by: Callable[[Tensor], Tensor]) -> Any:
    """A distribution, or a list of its transforms, with every tensor inside replaced; it no longer validates."""
    if isinstance(value, Tensor):
        return by(value)
    if isinstance(value, list):
        return [_moved(v, by) for v in value]
    if not isinstance(value, Distribution | torch.distributions.Transform):
        return value
    value = copy.copy(value)
    vars(value).update({k: _moved(v, by) for k, v in vars(value).items()} | {"_validate_args": False})
    return value


class FixedBase(nn.Module):
    """A torch.distributions.Distribution as a flow's base: moved and cast with the module, not trained, not in the
    state_dict.

    Dimensions of its batch count as dimensions of the event.
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        distribution = _moved(
            distribution, lambda t: t
        )  # ours: what is outside its support is improbable, not an error
        batch = len(distribution.batch_shape)
        self.distribution = Independent(distribution, batch) if batch else distribution  # type: ignore[no-untyped-call]
        self.shape = tuple(self.distribution.event_shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedBase:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.distribution = _moved(self.distribution, fn)
        return self

    @property
    def has_rsample(self) -> bool:
        return bool(self.distribution.has_rsample)

    def log_prob(self, z: Tensor) -> Tensor:
        if not len(z):  # Independent cannot sum nothing
            return z.new_empty(0)
        density: Tensor = self.distribution.log_prob(z)  # type: ignore[no-untyped-call]
        return density

    def sample(self, n: int) -> Tensor:
        z: Tensor = (self.distribution.rsample if self.has_rsample else self.distribution.sample)((n,))  # type: ignore[arg-type]
        return z

    def extra_repr(self) -> str:
        return repr(self.distribution)


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Torch's own random numbers drawn from ``generator``: distributions take none."""
    if generator is None:
        yield
        return
    seed = int(torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Flow(FlowModel):
    """A density from a base density and a bijection: log p(x) = log p_base(z) + log|det dz/dx|, z = f(x, context).

    Args:
        base: a torch.distributions.Distribution over one event (it moves and is cast with the flow, and is not
            trained), or a module with ``log_prob(z (N, D)) -> (N,)`` and either ``scaled(u, temperature)``, a sample
            from uniform numbers (as :class:`genfast.models.DiagonalGaussian` has), or ``sample(n) -> (n, D)``.
        transforms: a bijection, or several from data to latent; each has ``forward(x, context)`` and
            ``inverse(z, context)``, both returning (value, logdet (N,)).
        shape: of one x; that of the base without.

    Contexts are (N, K), a row for each x, or (K,) for all.

    Raises:
        TypeError: a base that is neither, or a bijection without an inverse.
        ValueError: no shape is known, or shapes do not fit.

    Source: Papamakarios et al. (arXiv:1912.02762, section 2).

    Example:
        >>> import torch, genfast
        >>> base = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        >>> flow = genfast.models.Flow(base, [genfast.nn.LULinear(3), genfast.nn.ActNorm(3)])
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        base: Distribution | nn.Module,
        transforms: nn.Module | Sequence[nn.Module],
        *,
        shape: Sequence[int] | None = None,
    ) -> None:
        if isinstance(base, nn.Module):
            missing = [n for n in ("log_prob",) if not callable(getattr(base, n, None))]
            if not any(callable(getattr(base, n, None)) for n in ("scaled", "sample")):
                missing.append("sample")
            if missing:
                raise TypeError(f"Flow: base {type(base).__name__} has no {' and no '.join(missing)}")
            known = getattr(base, "shape", None) if shape is None else shape
            if known is None and isinstance(getattr(base, "loc", None), Tensor):
                known = base.loc.shape
            if known is None:
                raise ValueError(
                    f"Flow: base {type(base).__name__} has neither shape nor loc; pass shape, that of one x"
                )
            super().__init__(tuple(known))
            self.base = base
        elif isinstance(base, Distribution):
            fixed = FixedBase(base)
            super().__init__(fixed.shape if shape is None else tuple(shape))
            self.base = fixed
            if math.prod(fixed.shape) != self.dim:
                raise ValueError(f"Flow: base has the event shape {fixed.shape}, which does not fit shape={self.shape}")
        else:
            raise TypeError(
                f"Flow: base is a {type(base).__name__}, expected a torch.distributions.Distribution or a module"
            )
        steps = [transforms] if isinstance(transforms, nn.Module) else list(transforms)
        self.flow: Any = self.layers.FlowSequential(*steps)
        self.config: dict[str, Any] = {}

    # ---- rows ----

    def _context(self, context: Tensor | None, n: int) -> Tensor | None:
        """(n, K) from (n, K) or (K,)."""
        if context is None or (context.dim() == 2 and context.shape[0] == n):
            return context
        if context.dim() == 1:
            return context.expand(n, -1)
        raise ValueError(
            f"{type(self).__name__}: context has shape {tuple(context.shape)}, expected ({n}, K), a row for each of "
            f"the {n}, or (K,); distribution(context).sample((n,)) draws n for each row"
        )

    def _rows(self, n: int | Sequence[int], context: Tensor | None) -> tuple[tuple[int, ...], int, Tensor | None]:
        """The leading shape of what is drawn, how many rows that is, and their contexts."""
        if isinstance(n, int):
            if n < 0:
                raise ValueError(f"{type(self).__name__}.sample: n={n}, expected at least 0")
            return (n,), n, self._context(context, n)
        lead = tuple(n) if context is None else (*n, *context.shape[:-1])
        if context is not None:
            context = context.expand(*lead, context.shape[-1]).reshape(-1, context.shape[-1])
        return lead, math.prod(lead), context

    def add_steps(self, builder: FlowBuilder) -> None:
        lower(self.flow, builder)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.flow(self.check(x), self._context(context, x.shape[0]))
        return result

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.flow.inverse(
            z.reshape(-1, *self.shape), self._context(context, z.shape[0])
        )
        return result

    # ---- the base ----

    def _base_density(self, z: Tensor) -> Tensor:
        flat = z.reshape(-1, *self.base.shape) if isinstance(self.base, FixedBase) else z.flatten(1)
        density: Tensor = self.base.log_prob(flat)
        return density

    def _draw(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """n latents, differentiable in the base's parameters where the base is."""
        name = type(self).__name__
        if not temperature >= 0:
            raise ValueError(f"{name}.sample: temperature={temperature}, expected at least 0")
        if hasattr(self.base, "scaled"):
            where = self.base.loc
            u = torch.empty(
                (n, self.dim), dtype=torch.float64, device=where.device if generator is None else generator.device
            )
            u.uniform_(generator=generator).clamp_(1e-12, 1 - 1e-12)
            drawn: Tensor = self.base.scaled(u.to(where.device), temperature).to(where.dtype)
            return drawn
        with _seeded(generator):
            z: Tensor = self.base.sample(n)
        if temperature == 1:
            return z
        try:
            mean = self.base.distribution.mean
        except (AttributeError, NotImplementedError):
            raise ValueError(
                f"{name}.sample: temperature={temperature}, and the base density has no mean to scale about"
            ) from None
        scaled: Tensor = mean + temperature * (z - mean)
        return scaled

    @property
    def has_rsample(self) -> bool:
        """Whether samples have gradients: the base's must."""
        return bool(getattr(self.base, "has_rsample", hasattr(self.base, "scaled")))

    # ---- what one asks of a density ----

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats, (N,)."""
        return super().log_prob(x, self._context(context, x.shape[0]))

    def rsample(
        self,
        n: int | Sequence[int],
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As :meth:`sample`, with gradients through the inverse and the base to all parameters and the context."""
        self._must_differentiate("rsample")
        lead, count, rows = self._rows(n, context)
        x: Tensor = self.inverse(self._draw(count, temperature, generator), rows)[0]
        return x.reshape(*lead, *self.shape)

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        n: int | Sequence[int],
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """n samples (n, *shape), one for each row of a context (n, K) or all for one context (K,).

        For a shape in place of a number, and a context (*B, K): (*n, *B, *shape), that many for each row, as
        distributions do.

        Args:
            temperature: multiplies the base density's deviation.
            generator: of the noise.
            rows: only these of all samples, (rows, *shape), from the noise of all: what one of several processes draws.
        """
        lead, count, contexts = self._rows(n, context)
        z = self._draw(count, temperature, generator)
        if rows is None:
            return self.inverse(z, contexts)[0].reshape(*lead, *self.shape)
        return self.inverse(z[rows], None if contexts is None else contexts[rows])[0].reshape(-1, *self.shape)

    def sample_and_log_prob(
        self,
        n: int | Sequence[int],
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples as :meth:`rsample` and their log p under this flow (whatever the temperature), in one pass.

        Both have gradients where the base's samples have, as a reverse KL divergence needs.
        """
        lead, count, rows = self._rows(n, context)
        with contextlib.nullcontext() if self.has_rsample else torch.no_grad():
            z = self._draw(count, temperature, generator)
            x, logdet = self.inverse(z, rows)
            log_prob = self._base_density(z) - logdet
        return x.reshape(*lead, *self.shape), log_prob.reshape(lead)

    def _must_differentiate(self, what: str) -> None:
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self).__name__}.{what}: samples of the base density have no gradient")

    def distribution(self, context: Tensor | None = None, *, kl_samples: int = 1024) -> FlowDistribution:
        """p(x | context) as a torch.distributions.Distribution: see :class:`FlowDistribution`."""
        return FlowDistribution(self, context, kl_samples=kl_samples)


class FlowDistribution(Distribution):
    """A flow at given contexts: batch_shape is that of the contexts (*B, K) without K, event_shape that of one x.

    ``torch.distributions.kl_divergence`` with it on either side is the mean of ``kl_samples`` samples of the first,
    with gradients where that one's samples have them.

    Args:
        flow: any :class:`Flow`; its parameters are used, not copied.
        context: (*B, K), or None.
        kl_samples: of each estimate of a divergence.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self, flow: Flow, context: Tensor | None = None, *, kl_samples: int = 1024, validate_args: bool | None = None
    ) -> None:
        self.flow, self.context, self.kl_samples = flow, context, kl_samples
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size(flow.shape), validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.flow.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        new = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        context = None if self.context is None else self.context.expand(*batch_shape, self.context.shape[-1])
        new.flow, new.context, new.kl_samples = self.flow, context, self.kl_samples
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new  # type: ignore[no-any-return]

    def _drawn(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        """What to ask of the flow: the batch is in the context, if there is one."""
        return tuple(sample_shape) if self.context is not None else (*sample_shape, *self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        split = value.dim() - len(self.event_shape)
        lead = torch.broadcast_shapes(value.shape[:split], self.batch_shape)
        rows = value.expand(*lead, *self.event_shape).reshape(-1, *self.event_shape)
        context = self.context
        if context is not None:
            context = context.expand(*lead, context.shape[-1]).reshape(-1, context.shape[-1])
        return self.flow.log_prob(rows, context).reshape(lead)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.flow.rsample(self._drawn(sample_shape), self.context)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.flow.sample(self._drawn(sample_shape), self.context)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Samples and their log p in one pass."""
        return self.flow.sample_and_log_prob(self._drawn(sample_shape), self.context)

    def __repr__(self) -> str:
        return (
            f"FlowDistribution({type(self.flow).__name__}, batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )


def _sampled_kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(p || q) as the mean of log p - log q over samples of p; without a gradient to p where its samples have
    none."""
    n = (p if isinstance(p, FlowDistribution) else q).kl_samples  # type: ignore[attr-defined]
    if isinstance(p, FlowDistribution):
        x, log_p = p.rsample_and_log_prob((n,))
    else:
        with contextlib.nullcontext() if p.has_rsample else torch.no_grad():
            x = p.rsample((n,)) if p.has_rsample else p.sample((n,))  # type: ignore[arg-type]
            log_p = p.log_prob(x)  # type: ignore[no-untyped-call]
    log_q: Tensor = q.log_prob(x)  # type: ignore[no-untyped-call]
    return (log_p - log_q).mean(0)


for _pair in ((FlowDistribution, FlowDistribution), (FlowDistribution, Distribution), (Distribution, FlowDistribution)):
    register_kl(*_pair)(_sampled_kl)  # type: ignore[no-untyped-call]
