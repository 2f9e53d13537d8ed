"""What all quasi-Newton optimizers share: one group, closures that all ranks agree about, state dicts."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.layouts import local_tensor
from distopt.quasi_newton.line_search import Trial
from distopt.quasi_newton.memory import MAX_DENSE
from distopt.quasi_newton.vectors import Vectors
from distopt.rule import require
from distopt.state.loading import fitting, match_parameters

COUNTS = ("max_iter", "max_eval", "history_size", "update_frequency")


class QuasiNewton(torch.optim.Optimizer):
    """Base of the optimizers that step along all parameters at once, with dot products over every rank.

    Parameters may be plain, DTensors of any mesh (FSDP2, HSDP, TP) or flat shards, all float32 or all float64, in one
    group. Vectors of state lie as the parameters do. The layout is read on the first of step, state, state_dict and
    load_state_dict.

    The loss that is searched is the mean of the ranks' closures: over the ranks that the parameters are sharded over, or
    over `process_group`, which replicas (DDP) must give: their gradients are means, so their losses have to be.
    """

    searches: ClassVar[bool] = True
    """Whether losses are compared, which then have to be those of all ranks."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None,
        options: dict[str, Any],
    ) -> None:
        for name in sorted(options):
            raise TypeError(
                f"{type(self).__name__} has no option {name!r}: it evaluates the loss several times a step and keeps its "
                "vectors in the parameters' dtype beside them, so nothing of it is encoded, paged, clipped or stepped in "
                "backward; leave the option out, or use a rule such as distopt.AdamW for it"
            )
        require(
            math.isfinite(defaults["lr"]) and defaults["lr"] > 0,
            f"lr must be a finite number > 0, got {defaults['lr']}",
        )
        for name in COUNTS:
            require(defaults.get(name, 1) >= 1, f"{name} must be ≥ 1, got {defaults.get(name)}")
        self._process_group = process_group
        self._vectors: Vectors | None = None
        self._numbers: dict[str, float] = {}
        self._memory: Any = None
        super().__init__(params, defaults)
        require(
            len(self.param_groups) == 1,
            f"{type(self).__name__} steps along all parameters at once: it takes one group, got {len(self.param_groups)}",
        )

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter; binds."""
        if not self.__dict__.get("param_groups"):
            return defaultdict(dict)
        self._bind()
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        assert not value, "states are made at bind and loaded with load_state_dict"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled; build another one and load its state_dict()"
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As torch's, every vector as its parameter lies, numbers with the first parameter. Never collective."""
        self._bind()
        self._progress.copy_(torch.tensor(list(self._exported().values()), dtype=torch.float64))
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class. Parameters are matched by name where both sides have names.

        Raises:
            ValueError: other parameters, states, shapes or placements; nothing is changed.
        """
        self._bind()
        group, saved = self.param_groups[0], state_dict["param_groups"][0]
        indices = match_parameters(0, self._names(), saved, named="param_names" in group)
        writes: list[tuple[Tensor, Tensor]] = []
        for index, name, param in zip(indices, self._names(), group["params"]):
            found, live = state_dict["state"].get(index, {}), self._state[param]
            if set(found) != set(live):
                raise ValueError(
                    f"{name!r}: the state dict has states {sorted(found)}, {type(self).__name__} keeps {sorted(live)}"
                )
            for key, value in live.items():
                writes.append((local_tensor(value), fitting(found[key], value, tuple(value.shape), name, key)))
        for target, source in writes:
            target.copy_(source)
        group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        numbers = dict(zip(self._exported(), self._progress.tolist()))
        self._numbers = {key: numbers[key] for key in self._numbers}
        if self._memory is not None:
            self._memory.restore(numbers)

    def _names(self) -> list[str]:
        group = self.param_groups[0]
        return list(group.get("param_names") or (f"0.{i}" for i in range(len(group["params"]))))

    def _slabs(self, vectors: Vectors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States to be made: (vectors (…, local elements), others that every rank has alike), by name."""
        raise NotImplementedError

    def _exported(self) -> dict[str, float]:
        """The numbers of the state, always the same ones."""
        return {**self._numbers, **(self._memory.numbers() if self._memory is not None else {})}

    def _bind(self) -> Vectors:
        """Read layouts and make states, once."""
        if self._vectors is None:
            group = self.param_groups[0]
            words = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            vectors = Vectors(group, {"class": type(self).__name__, **words}, self._process_group)
            if vectors.bound.norm.size == 1 and dist.is_initialized() and dist.get_world_size() > 1 and self.searches:
                warnings.warn(
                    f"{type(self).__name__}: parameters are plain, so each rank searches on the loss of its own closure; "
                    "replicas (DDP) must give process_group=, or they drift apart",
                    stacklevel=3,
                )
            slabs, others = self._slabs(vectors)
            self._progress = torch.zeros(len(self._exported()), dtype=torch.float64)
            self._state: defaultdict[Tensor, Any] = defaultdict(dict)
            for number, param in enumerate(group["params"]):
                self._state[param] = {name: vectors.face(number, slab) for name, slab in slabs.items()}
            self._state[group["params"][0]] |= {"progress": self._progress, **others}
            self._vectors = vectors
        return self._vectors

    def _evaluate(self, closure: Callable[[], Any], direction: Tensor, t: float = 0.0) -> tuple[Trial, Any, float]:
        """Call the closure where the weights are; one round.

        Returns:
            The trial, what the closure returned, and the sum of magnitudes of the gradient.

        Raises:
            ValueError: no gradient on any rank.
        """
        vectors = self._bind()
        with torch.enable_grad():
            returned = closure()
        grad, present = vectors.gradient()
        there = torch.tensor([float(present)], dtype=torch.float64, device=vectors.device)
        slope = vectors.products(grad[None], direction[None])
        (slopes, magnitudes, theres), (largest,), loss = vectors.reduce(
            [slope, vectors.absolute_sum(grad), there], [grad], loss=float(returned)
        )
        require(
            theres.item() > 0,
            "no parameter has a gradient after the closure; it must call backward() on the loss of these very parameters "
            "(was the model sharded after the optimizer was built?)",
        )
        return Trial(t, loss, slopes.item(), grad, largest), returned, magnitudes.item()

    def _closure(self, closure: Callable[[], Any] | None) -> Callable[[], Any]:
        if closure is None:
            raise ValueError(
                f"{type(self).__name__}.step needs a closure that clears the gradients, computes the loss, calls "
                "backward() and returns the loss: optimizer.step(closure)"
            )
        return closure


def require_small(vectors: Vectors, name: str) -> None:
    """Refuse what a dense matrix is too large for.

    Raises:
        ValueError: naming the limit.
    """
    require(
        vectors.numel <= MAX_DENSE,
        f"{name} keeps a dense matrix: {vectors.numel:,} parameters, at most {MAX_DENSE:,}; use LBFGS",
    )


def require_finite(trial: Trial) -> None:
    """Refuse to start from a loss or gradient that is not finite.

    Raises:
        ValueError: with the loss; on every rank, before anything is changed.
    """
    require(
        math.isfinite(trial.loss) and math.isfinite(trial.largest),
        f"the closure's loss is {trial.loss} with a largest gradient of {trial.largest}; nothing was changed",
    )
