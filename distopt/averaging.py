"""Averages of weights along a run, for evaluation and for the model that is kept.

    average = EMA(model, decay=0.999)       # after the model is sharded
    …
    optimizer.step()
    average.update()
    …
    with average.swapped():                 # the weights are the average in here
        evaluate(model)

Averaging trades against the end of the schedule: it gives most where the learning rate is still high, and least after a
decay to zero (Ajroldi et al., 2025, arXiv 2502.06761). An average works on what lies on this rank and sends nothing: any
layout will do. Buffers (batch norm's statistics) are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distopt.layouts import local_tensor, reshard
from distopt.names import parameter_names, strip_prefixes
from distopt.optimizer import Optimizer
from distopt.rule import require

__all__ = ["EMA", "LAWA", "LAWAEMA", "Average"]


class Average:
    """Base of all averages.

    Args:
        source: a model, whose trainable parameters are averaged, or an optimizer, whose parameters are. Shard first: the
            tensors are looked up once, here. Under FSDP2 give the model, or what create_optimizer made: only these know
            the gathered copies that a forward pass leaves behind.
        every: take the weights on each `every`-th call of `update`.
        slots: tensors kept per parameter.
        dtype: of what is kept; None: the parameter's.

    Raises:
        ValueError: `every` or `slots` below 1, or nothing to average.
    """

    def __init__(
        self, source: nn.Module | torch.optim.Optimizer, *, every: int, slots: int, dtype: torch.dtype | None
    ) -> None:
        require(every >= 1, f"every={every}: expected at least 1 step")
        self.every, self.num_updates = every, 0
        self._source, self._swapped = source, False
        self._params = _parameters(source)
        require(bool(self._params), f"{type(source).__name__} has no parameters that require grad; nothing to average")
        self._slots = [
            [torch.zeros(w.shape, dtype=dtype or w.dtype, device=w.device) for w in self._weights()]
            for _ in range(slots)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take note of a step; call it after each `optimizer.step()`.

        Raises:
            ValueError: the weights are swapped; the model has other parameters by now.
        """
        require(not self._swapped, "update() inside swapped(): the weights are the average; leave the block first")
        self._check_parameters()
        self.num_updates += 1
        if self.num_updates % self.every == 0:
            self._take(self._weights(), self.num_updates // self.every - 1)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the weights be the average. What they were comes back bit for bit, also after an exception; changes that
        are made to them inside are lost.

        Raises:
            ValueError: nothing was averaged yet, or they are swapped already.
        """
        require(
            self.num_updates >= self.every,
            f"nothing to swap in after {self.num_updates} of every={self.every} updates; call update() after each step",
        )
        require(not self._swapped, "swapped() inside swapped(): the weights are the average already")
        self._check_parameters()
        with torch.no_grad():
            weights = self._weights()
            kept = [weight.clone() for weight in weights]
            for weight, average in zip(weights, self._averages()):
                weight.copy_(average)
        self._swapped = True
        try:
            yield
        finally:
            self._reshard()
            with torch.no_grad():
                for weight, before in zip(weights, kept):
                    weight.copy_(before)
            self._swapped = False

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, parameter, kept tensor as the parameter lies: a DTensor where that is one) of everything kept."""
        for slot, tensors in enumerate(self._slots):
            for (name, param), tensor in zip(self._params.items(), tensors):
                yield f"{slot}.{name}", param, _like(tensor, param)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything kept, by name, and `num_updates`: DTensors with the parameters' placements, plain tensors where the
        parameters are plain, so that torch.distributed.checkpoint saves and reshards it. A flat shard carries its range
        in its name and loads under the same cuts only; `distopt.checkpoint` reshards those too."""
        state = {_ranged(name, param): tensor for name, param, tensor in self.tensors()}
        return {**state, "num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continue from a `state_dict()` of the same layout.

        Raises:
            ValueError: other names, shapes, meshes or placements; nothing is changed.
        """
        here = self.state_dict()
        odd = sorted(here.keys() ^ state_dict.keys())
        require(
            not odd, f"the state dict and this {type(self).__name__} do not both have {odd[:5]} ({len(odd)} in all)"
        )
        for name, live in here.items():
            value = state_dict[name]
            fits = value.shape == live.shape and isinstance(value, DTensor) == isinstance(live, DTensor)
            if fits and isinstance(value, DTensor) and isinstance(live, DTensor):
                fits = value.placements == live.placements and value.device_mesh == live.device_mesh
            require(
                fits,
                f"{name!r}: got {_words(value)}, expected {_words(live)}; reshard through torch.distributed.checkpoint or "
                "distopt.checkpoint",
            )
        for name, live in here.items():
            local_tensor(live).copy_(local_tensor(state_dict[name]))
        self.num_updates = int(state_dict["num_updates"])

    def _take(self, weights: list[Tensor], number: int) -> None:
        """Take the weights in, for the `number`-th time (from 0)."""
        raise NotImplementedError

    def _averages(self) -> Iterator[Tensor]:
        """The average of each parameter, local."""
        raise NotImplementedError

    def _weights(self) -> list[Tensor]:
        """The local weights, in storage."""
        return [local_tensor(param) for param in self._params.values()]

    def _check_parameters(self) -> None:
        self._reshard()
        now = _parameters(self._source)
        moved = [name for name, param in self._params.items() if now.get(name) is not param]
        require(not moved, f"{moved[:5]} are other tensors than when this average was made; make it after sharding")

    def _reshard(self) -> None:
        model: object = self._source
        if isinstance(model, Optimizer) and model._model is not None:
            model = model._model()
        if isinstance(model, nn.Module):
            reshard(model)


class EMA(Average):
    """Exponential moving average, in fp32: average ← decay · average + (1 − decay) · weights (the numbers of
    torch.optim.swa_utils.get_ema_multi_avg_fn). The first update is taken as it is.

    Args:
        source: see `Average`.
        decay: share of the average that stays at each update, in [0, 1): it looks about 1/(1 − decay) updates back.
        every: steps between updates.
    """

    def __init__(self, source: nn.Module | torch.optim.Optimizer, *, decay: float, every: int = 1) -> None:
        require(0 <= decay < 1, f"decay={decay}: expected a number in [0, 1)")
        super().__init__(source, every=every, slots=1, dtype=torch.float32)
        self.decay = decay

    def _take(self, weights: list[Tensor], number: int) -> None:
        torch._foreach_lerp_(self._slots[0], [w.float() for w in weights], 1 - self.decay if number else 1.0)

    def _averages(self) -> Iterator[Tensor]:
        return iter(self._slots[0])


class LAWAEMA(EMA):
    """LAWA with an exponential average in place of the queue: an EMA of a snapshot each `every` steps, at the price of
    one fp32 copy instead of `num_snapshots` (Ajroldi et al., 2025)."""

    def __init__(self, source: nn.Module | torch.optim.Optimizer, *, every: int, decay: float = 0.9) -> None:
        super().__init__(source, decay=decay, every=every)


class LAWA(Average):
    """Latest weight averaging: the mean of the last `num_snapshots` snapshots, one each `every` steps; of those there
    are, while they are fewer (Kaddour, 2022, arXiv 2209.14981).

    Snapshots are exact, in the parameter's dtype; their mean is taken in fp32. All slots are allocated at once.

    Args:
        source: see `Average`.
        num_snapshots: length of the queue.
        every: steps between snapshots (the paper: an epoch).
    """

    def __init__(self, source: nn.Module | torch.optim.Optimizer, *, num_snapshots: int, every: int) -> None:
        require(num_snapshots >= 1, f"num_snapshots={num_snapshots}: expected at least 1")
        super().__init__(source, every=every, slots=num_snapshots, dtype=None)

    def _take(self, weights: list[Tensor], number: int) -> None:
        torch._foreach_copy_(self._slots[number % len(self._slots)], weights)

    def _averages(self) -> Iterator[Tensor]:
        count = min(self.num_updates // self.every, len(self._slots))
        for snapshots in zip(*self._slots[:count]):
            total = snapshots[0].float()
            for snapshot in snapshots[1:]:
                total = total + snapshot
            yield total / count


def _parameters(source: nn.Module | torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is averaged, by name."""
    if isinstance(source, nn.Module):
        return {strip_prefixes(name): param for name, param in source.named_parameters() if param.requires_grad}
    params = [param for group in source.param_groups for param in group["params"]]
    return dict(zip(parameter_names(source.param_groups), params))


def _like(local: Tensor, param: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _ranged(name: str, param: Tensor) -> str:
    spec = getattr(param, "_distopt_flat", None)
    return name if spec is None else f"{name}[{spec.start}:{spec.start + param.numel()}]"


def _words(value: Tensor) -> str:
    placed = f" with placements {value.placements}" if isinstance(value, DTensor) else ", plain"
    return f"shape {tuple(value.shape)}{placed}"
