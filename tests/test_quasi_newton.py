"""Quasi-Newton methods: iterates against torch.optim.LBFGS's and against formulas, on one process and on ranks of any layout.

Compared are the weights at every evaluation of the closure, in float64: rounding alone is amplified along the way, so that
a long run from a start one bit away ends elsewhere, torch's own too.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import softplus

import distopt
from distopt.quasi_newton import DRIVERS
from distopt.quasi_newton.memory import History
from distopt.quasi_newton.sr1 import minimum_in_ball
from distopt.quasi_newton.vectors import Vectors
from tests.distributed.layouts import LAYOUTS, Full, Laid, lay_out, local_tensor, ranks_mesh
from tests.distributed.pool import pool

HERE = __name__
Options = dict[str, Any]
WOLFE: Options = {"line_search_fn": "strong_wolfe"}
SHORT: Options = {**WOLFE, "max_iter": 7}


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def logistic(x: Tensor, part: slice = slice(None)) -> Tensor:
    """A regularized logistic regression of as many features as x has."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(200, len(x), generator=generator, dtype=torch.float64)
    labels = (torch.rand(200, generator=generator) < 0.5).double() * 2 - 1
    return softplus(-labels * (features @ x))[part].mean() + 5e-3 * x.square().sum()


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rosenbrock": {"x": (2,)},
    # Uneven and empty shards over 2 and 4 ranks, names that the TP layouts cut.
    "logistic": {"up": (6, 4), "down": (4, 6), "norm": (5,), "empty": (0, 4)},
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"rosenbrock": rosenbrock, "logistic": logistic}


def first_weights(problem: str) -> Full:
    if problem == "rosenbrock":
        return {"x": torch.tensor([-1.2, 1.0], dtype=torch.float64)}
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES[problem].items()}


def flat(full: Full) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in full.values()])


def one_process(cls: Any, problem: str, options: Options, steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weights at every evaluation and in the end."""
    params = {name: nn.Parameter(tensor.to(dtype)) for name, tensor in first_weights(problem).items()}
    optimizer = cls(list(params.values()), **options)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        x = torch.cat([param.flatten() for param in params.values()])
        seen.append(x.detach().clone())
        loss = LOSSES[problem](x.double()).to(dtype)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return torch.stack([*seen, flat({n: p.detach() for n, p in params.items()})])


def closure_of(laid: Laid, problem: str, seen: list[Tensor]) -> Callable[[], float]:
    """A closure that computes the loss of the gathered weights, the same on every rank, and hands out gradients."""
    shapes = SHAPES[problem]

    def closure() -> float:
        full = laid.gather(shapes)
        leaves = {name: tensor.requires_grad_() for name, tensor in full.items()}
        x = flat(leaves)
        seen.append(x.detach().clone())
        loss = LOSSES[problem](x)
        loss.backward()
        laid.set_grads({name: leaf.grad for name, leaf in leaves.items()})
        return loss.item()

    return closure


def on_ranks(optimizer: str, problem: str, options: Options, steps: int, layout: str) -> Tensor:
    laid = lay_out(LAYOUTS[layout], first_weights(problem))
    built = getattr(distopt, optimizer)(laid.named(), **options)
    seen: list[Tensor] = []
    for _ in range(steps):
        built.step(closure_of(laid, problem, seen))
    return torch.stack([*seen, flat(laid.gather(SHAPES[problem]))])


def assert_same_iterates(ours: Tensor, theirs: Tensor, atol: float = 1e-6) -> None:
    assert ours.shape == theirs.shape, "another number of evaluations"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# ---- L-BFGS against torch's

RUNS: list[Options] = [
    WOLFE,
    {**WOLFE, "history_size": 4},
    {**WOLFE, "lr": 0.3, "max_iter": 7, "max_eval": 9},
    {**WOLFE, "tolerance_change": 1e-4, "max_iter": 40},
    {"lr": 1e-3},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
@pytest.mark.parametrize("problem", LOSSES)
def test_iterates_are_torchs(problem: str, options: Options) -> None:
    theirs = one_process(torch.optim.LBFGS, problem, options, steps=4)
    assert len(theirs) > 5
    assert_same_iterates(one_process(distopt.LBFGS, problem, options, steps=4), theirs)


def test_iterates_are_torchs_in_float32() -> None:
    options = {**WOLFE, "max_iter": 12}
    theirs = one_process(torch.optim.LBFGS, "logistic", options, 1, torch.float32)
    assert_same_iterates(one_process(distopt.LBFGS, "logistic", options, 1, torch.float32), theirs, atol=1e-4)


def test_the_constructor_is_torchs() -> None:
    import inspect

    theirs = list(inspect.signature(torch.optim.LBFGS).parameters.values())
    ours = list(inspect.signature(distopt.LBFGS).parameters.values())[: len(theirs)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("problem", LOSSES)
@pytest.mark.parametrize("layout", ["distributed", "flat", "hsdp", "fsdp-tp", "distributed-replicate"])
def test_iterates_on_four_ranks_are_torchs_on_one(problem: str, layout: str) -> None:
    if problem == "rosenbrock" and layout == "fsdp-tp":
        pytest.skip("the names of TP layouts are of matrices")
    theirs = one_process(torch.optim.LBFGS, problem, WOLFE, steps=3)
    for ours in pool(4).run(f"{HERE}:on_ranks", "LBFGS", problem, WOLFE, 3, layout):
        assert_same_iterates(ours, theirs)


class Regression(nn.Module):
    """The logistic regression as a model, without its penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(flat(first_weights("logistic")))

    def forward(self, part: slice) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(200, 53, generator=generator, dtype=torch.float64)
        labels = (torch.rand(200, generator=generator) < 0.5).double() * 2 - 1
        return softplus(-labels[part] * (features[part] @ self.weight)).mean()


def data_parallel(kind: str) -> tuple[Tensor, int, int, int]:
    """The regression with its rows divided over the ranks: the weights in the end; of the last step, collectives,
    iterations and evaluations."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model: nn.Module = Regression()
    group = None
    if kind == "fsdp":
        fully_shard(model, mesh=ranks_mesh())
    else:
        group = dist.group.WORLD
        model = nn.parallel.DistributedDataParallel(model)
    [weight] = model.parameters()
    optimizer = distopt.LBFGS([weight], **SHORT, process_group=group)
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = model(slice(rank * 200 // size, (rank + 1) * 200 // size))
        loss.backward()
        local_tensor(weight.grad).add_(local_tensor(weight).detach(), alpha=1e-2)  # the penalty, same on every rank
        squares = weight.detach().square().sum()
        return loss.item() + 5e-3 * (squares.full_tensor() if isinstance(squares, DTensor) else squares).item()

    optimizer.step(closure)
    traffic, numbers = optimizer._bind().bound.domains.traffic, optimizer._numbers
    traffic.calls, calls, before = 0, 0, numbers["n_iter"]
    optimizer.step(closure)
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole.detach().clone(), traffic.calls, int(numbers["n_iter"] - before), calls


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_data_parallel_losses_are_averaged(kind: str, world_size: int) -> None:
    expected = one_process(torch.optim.LBFGS, "logistic", SHORT, steps=2)[-1]
    for weight, collectives, iterations, calls in pool(world_size).run(f"{HERE}:data_parallel", kind):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
        assert iterations > 5
        # replicas need none for dot products: only their losses are reduced
        assert collectives == calls + (2 * iterations if kind == "fsdp" else 0)


def test_direction_is_that_of_the_dense_matrix() -> None:
    """Newest and average scale, a full ring: against BFGS updates of a dense matrix with the pairs in order."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    history = History(Vectors({"params": [param]}, {}, None), 4)
    curvature = torch.randn(9, 9, dtype=torch.float64)
    curvature = curvature @ curvature.T + torch.eye(9, dtype=torch.float64)
    pairs, scales = [], []
    for _ in range(7):
        s, grad = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
        y = curvature @ s
        history.learn(s, y)
        pairs, scales = [*pairs, (s, y)][-4:], [*scales, s.dot(y) / y.dot(y)][-4:]
        for average in (False, True):
            scale = torch.stack(scales).mean() if average else scales[-1]
            inverse = scale * torch.eye(9, dtype=torch.float64)
            for step, change in pairs:
                rho = 1 / step.dot(change)
                left = torch.eye(9, dtype=torch.float64) - rho * torch.outer(step, change)
                inverse = left @ inverse @ left.T + rho * torch.outer(step, step)
            found = history.direction(grad, True, average)
            torch.testing.assert_close(found, -inverse @ grad, rtol=1e-10, atol=1e-10)


# ---- dense methods


def test_bfgs_matrix_is_the_inverse_of_the_direct_update() -> None:
    x = nn.Parameter(first_weights("rosenbrock")["x"])
    optimizer = distopt.BFGS([x], max_iter=1, max_eval=25)
    points: list[tuple[Tensor, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(x)
        loss.backward()
        return loss

    hessian = None
    for _ in range(8):
        loss = rosenbrock(x)
        points.append((x.detach().clone(), torch.autograd.grad(loss, x)[0]))
        if len(points) > 1:
            s, y = (b - a for a, b in zip(points[-2], points[-1]))
            if hessian is None:
                hessian = y.dot(y) / s.dot(y) * torch.eye(2, dtype=torch.float64)
            hs = hessian @ s
            hessian = hessian - torch.outer(hs, hs) / s.dot(hs) + torch.outer(y, y) / s.dot(y)
        optimizer.step(closure)  # learns the pair, then moves
        if hessian is not None:
            inverse = optimizer.state[x]["inverse_hessian"]
            torch.testing.assert_close(inverse @ hessian, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["LBFGS", "BFGS", "SR1"])
@pytest.mark.parametrize("problem", LOSSES)
def test_all_find_scipys_minimum(optimizer: str, problem: str) -> None:
    start = flat(first_weights(problem))

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(x, requires_grad=True)
        loss = LOSSES[problem](leaf)
        loss.backward()
        return loss.item(), leaf.grad.numpy()

    theirs = scipy.optimize.minimize(value, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-9})
    options = {} if optimizer == "SR1" else {**WOLFE, "tolerance_change": 1e-14}
    ours = one_process(getattr(distopt, optimizer), problem, {"max_iter": 200, "tolerance_grad": 1e-9, **options}, 1)[
        -1
    ]
    torch.testing.assert_close(ours, torch.from_numpy(theirs.x), rtol=0, atol=1e-5)


def test_sr1_learns_a_quadratic_exactly() -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    hessian = basis @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2], dtype=torch.float64)) @ basis.T
    x = nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = distopt.SR1([x], lr=0.3, max_iter=30)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * x @ hessian @ x
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(optimizer.state[x]["hessian"], hessian, rtol=0, atol=1e-8)
    assert x.detach().abs().max() < 1e-7


def test_sr1_leaves_a_saddle_by_its_negative_curvature() -> None:
    x = nn.Parameter(torch.tensor([0.5, 1e-3], dtype=torch.float64))
    optimizer = distopt.SR1([x], max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x[0] ** 2 + x[1] ** 4 - x[1] ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(x.detach().abs(), torch.tensor([0.0, 0.5**0.5], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["inside", "outside", "indefinite", "hard"])
def test_minimum_in_ball_fulfils_the_optimality_conditions(case: str) -> None:
    torch.manual_seed(0)
    values = torch.tensor([-1.0 if case in ("indefinite", "hard") else 0.3, 0.7, 2.0, 4.0], dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    hessian = basis @ torch.diag(values) @ basis.T
    grad = basis @ torch.tensor([0.0 if case == "hard" else 0.5, 0.2, 0.1, -0.3], dtype=torch.float64)
    radius = 100.0 if case == "inside" else 0.5
    step = minimum_in_ball(hessian, grad, radius)
    length = step.norm().item()
    assert length <= radius * (1 + 1e-9)
    shift = -float((hessian @ step + grad).dot(step) / step.dot(step))  # (B + λI)s = −g
    assert shift >= -1e-9
    assert shift >= -float(values[0]) - 1e-6
    torch.testing.assert_close(hessian @ step + shift * step, -grad, rtol=0, atol=1e-6)
    assert abs(shift * (radius - length)) < 1e-6
    assert (length < radius * 0.99) == (case == "inside")


@pytest.mark.parametrize("optimizer", ["BFGS", "SR1"])
@pytest.mark.parametrize("layout", ["distributed", "flat", "hsdp", "distributed-replicate"])
def test_dense_methods_on_ranks_take_the_steps_of_one_process(optimizer: str, layout: str) -> None:
    options = {"max_iter": 10}
    expected = one_process(getattr(distopt, optimizer), "logistic", options, steps=2)
    for found in pool(4).run(f"{HERE}:on_ranks", optimizer, "logistic", options, 2, layout):
        assert_same_iterates(found, expected)


# ---- stochastic methods


def two_loop(pairs: list[tuple[Tensor, Tensor]], scale: Tensor, grad: Tensor) -> Tensor:
    """The textbook's recursion."""
    q, alphas = grad.clone(), []
    for s, y in reversed(pairs):
        alphas.append(s.dot(q) / s.dot(y))
        q = q - alphas[-1] * y
    q = q * scale
    for (s, y), alpha in zip(pairs, reversed(alphas)):
        q = q + s * (alpha - y.dot(q) / s.dot(y))
    return q


def batch(step: int) -> slice:
    return slice(40 * (step % 5), 40 * (step % 5) + 40)


def stochastic_reference(kind: str, options: Options, steps: int) -> Tensor:
    """The papers' algorithms, naively."""
    x = flat(first_weights("logistic"))
    pairs: list[tuple[Tensor, Tensor]] = []
    means: list[Tensor] = []

    def gradient(x: Tensor, step: int) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(logistic(x, batch(step)), x)[0]

    for step in range(steps):
        grad = gradient(x, step)
        if kind == "StochasticLBFGS":
            if pairs:
                scale = torch.stack([s.dot(y) / y.dot(y) for s, y in pairs]).mean()
                move = -options["lr"] * two_loop(pairs, scale, grad)
            else:
                move = -options["lr"] * min(1, 1 / grad.abs().sum()) * grad
            change = gradient(x + move, step) - grad + options["damping"] * move
            pairs = [*pairs, (move, change)][-options["history_size"] :]
            x = x + move
            continue
        beta = options["beta"]
        now = [x, grad] if not means else [beta * m + (1 - beta) * v for m, v in zip(means, (x, grad))]
        means = now
        if step == 0:
            last = now
        elif (step + 1) % options["update_frequency"] == 0:
            s, y = (b - a for a, b in zip(last, now))
            mu, (low, high), tau = s.dot(y) / s.dot(s), options["bounds"], options["damping"]
            if mu <= low:
                tau = min((1 - low) / (1 - mu), tau)
            elif mu >= high:
                tau = min((high - 1) / (mu - 1), tau)
            pairs = [*pairs, (s, tau * y + (1 - tau) * s)][-options["history_size"] :]
            last = now
        scale = pairs[-1][0].dot(pairs[-1][1]) / pairs[-1][1].dot(pairs[-1][1]) if pairs else torch.tensor(1.0)
        x = x - options["lr"] * two_loop(pairs, scale, grad)
    return x


def stochastic(kind: str, options: Options, steps: int, layout: str | None) -> Tensor:
    """The weights in the end; on this process alone without a layout."""
    if layout is None:
        params = {name: nn.Parameter(tensor) for name, tensor in first_weights("logistic").items()}
        laid = Laid(params, {n: torch.arange(p.numel()) for n, p in params.items()})
    else:
        laid = lay_out(LAYOUTS[layout], first_weights("logistic"))
    optimizer = getattr(distopt, kind)(laid.named(), **options)

    def whole() -> Full:
        if layout is None:
            return {name: param.detach().clone() for name, param in laid.params.items()}
        return laid.gather(SHAPES["logistic"])

    for step in range(steps):

        def closure(step: int = step) -> float:
            leaves = {name: tensor.requires_grad_() for name, tensor in whole().items()}
            loss = logistic(flat(leaves), batch(step))
            loss.backward()
            laid.set_grads({name: leaf.grad for name, leaf in leaves.items()})
            return loss.item()

        optimizer.step(closure)
    return flat(whole())


STOCHASTIC: list[tuple[str, Options]] = [
    ("StochasticLBFGS", {"lr": 0.3, "history_size": 3, "damping": 0.01}),
    (
        "MLBFGS",
        {"lr": 0.2, "beta": 0.7, "history_size": 3, "update_frequency": 4, "damping": 0.9, "bounds": (0.1, 1.2)},
    ),
    (
        "MLBFGS",
        {"lr": 0.2, "beta": 0.5, "history_size": 2, "update_frequency": 2, "damping": 0.8, "bounds": (0.01, 1.01)},
    ),
]


@pytest.mark.parametrize(("kind", "options"), STOCHASTIC, ids=str)
def test_stochastic_methods_equal_their_papers(kind: str, options: Options) -> None:
    expected = stochastic_reference(kind, options, steps=25)
    torch.testing.assert_close(stochastic(kind, options, 25, None), expected, rtol=0, atol=1e-9)
    for layout in ("distributed", "flat"):
        for found in pool(4).run(f"{HERE}:stochastic", kind, options, 25, layout):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_stochastic_lbfgs_ends_below_sgd_on_an_ill_conditioned_problem() -> None:
    """Both with the best of five learning rates."""

    def loss_after(cls: Any, lr: float) -> float:
        x = nn.Parameter(torch.ones(20, dtype=torch.float64))
        scales = torch.logspace(0, 3, 20, dtype=torch.float64)
        optimizer = cls([x], lr=lr)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = 0.5 * (scales * x.square()).sum()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)
        return closure().nan_to_num(1e9).item()

    def best(cls: Any) -> float:
        return min(loss_after(cls, lr) for lr in (1e-4, 1e-3, 1e-2, 0.1, 1.0))

    assert best(distopt.StochasticLBFGS) < 0.1 * best(torch.optim.SGD)


# ---- state


def run_and_save(optimizer: str, options: Options, layout: str, path: Path) -> Tensor:
    """Two steps, a checkpoint, two more steps."""
    laid = lay_out(LAYOUTS[layout], first_weights("logistic"))
    built = getattr(distopt, optimizer)(laid.named(), **options)
    for _ in range(2):
        built.step(closure_of(laid, "logistic", []))
    model = holder(laid)
    dcp.save({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, built)}, checkpoint_id=path)
    for _ in range(2):
        built.step(closure_of(laid, "logistic", []))
    return flat(laid.gather(SHAPES["logistic"]))


def load_and_run(optimizer: str, options: Options, layout: str, path: Path) -> Tensor:
    """Into a fresh optimizer, then two steps."""
    laid = lay_out(LAYOUTS[layout], {name: torch.zeros_like(w) for name, w in first_weights("logistic").items()})
    built = getattr(distopt, optimizer)(laid.named(), **options)
    model = holder(laid)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, built)}
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(model, built, state["optimizer"])
    for _ in range(2):
        built.step(closure_of(laid, "logistic", []))
    return flat(laid.gather(SHAPES["logistic"]))


def holder(laid: Laid) -> nn.Module:
    model = nn.Module()
    for name, param in laid.params.items():
        model.register_parameter(name, param)  # type: ignore[arg-type]
    return model


SAVED: list[tuple[str, Options]] = [
    ("LBFGS", {**WOLFE, "max_iter": 4, "history_size": 5}),
    ("BFGS", {"max_iter": 4}),
    ("SR1", {"max_iter": 4}),
    ("StochasticLBFGS", {"lr": 0.3, "history_size": 1}),
    ("MLBFGS", {"lr": 0.2, "update_frequency": 1}),
]


@pytest.mark.parametrize(("optimizer", "options"), SAVED, ids=str)
def test_torchs_checkpoint_carries_the_state_to_other_ranks(optimizer: str, options: Options, tmp_path: Path) -> None:
    went_on = pool(4).run(f"{HERE}:run_and_save", optimizer, options, "fsdp", tmp_path)[0]
    for found in pool(4).run(f"{HERE}:load_and_run", optimizer, options, "fsdp", tmp_path):
        assert torch.equal(found, went_on)
    for found in pool(2).run(f"{HERE}:load_and_run", optimizer, options, "columns", tmp_path):
        torch.testing.assert_close(found, went_on, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", DRIVERS.values())
def test_a_number_is_a_parameter_too(name: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"scale": (), "none": (0,), "row": (1, 3)}
    params = {key: nn.Parameter(torch.full(shape, 2.0)) for key, shape in shapes.items()}
    built = getattr(distopt, name)(params.items(), lr=0.1)

    def loss() -> Tensor:
        built.zero_grad()
        found = sum((param.square().sum() for param in params.values()), torch.zeros(()))
        found.backward()
        return found

    before = loss().item()
    for _ in range(3):
        built.step(loss)
    built.load_state_dict(built.state_dict())
    assert loss().item() < before


@pytest.mark.parametrize("name", DRIVERS.values())
def test_the_native_checkpoint_names_the_one_that_takes_them(name: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    built = getattr(distopt, name)(model.parameters())
    for use in (distopt.checkpoint.save, distopt.checkpoint.load):
        with pytest.raises(
            TypeError, match=rf"not the vectors of {name}; .*get_optimizer_state_dict\(model, optimizer\)"
        ):
            use(tmp_path / "step", model=model, optimizer=built)
    assert not (tmp_path / "step").exists()


def quadratic(x: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rosenbrock(x)
        loss.backward()
        return loss

    return closure


def test_state_dicts_continue_bit_for_bit_and_refuse_other_histories() -> None:
    x, y = (nn.Parameter(torch.tensor([-1.2, 1.0])) for _ in range(2))
    first, second = (distopt.LBFGS([p], max_iter=3, history_size=4, **WOLFE) for p in (x, y))
    for _ in range(3):
        first.step(quadratic(x, first))
    second.load_state_dict(first.state_dict())
    y.data.copy_(x.data)
    for _ in range(3):
        first.step(quadratic(x, first))
        second.step(quadratic(y, second))
    assert torch.equal(x, y)
    before = second.state_dict()["state"][0]["steps"].clone()
    with pytest.raises(ValueError, match=r"state 'steps' has shape \(5, 2\), expected \(4, 2\)"):
        second.load_state_dict(distopt.LBFGS([x], history_size=5).state_dict())
    with pytest.raises(ValueError, match=r"the state dict has states \[\], LBFGS keeps"):
        second.load_state_dict(torch.optim.LBFGS([x]).state_dict())
    assert torch.equal(second.state_dict()["state"][0]["steps"], before)


# ---- misuse


@pytest.mark.parametrize("name", [cls for cls in DRIVERS.values() if cls != "MLBFGS"])
def test_a_missing_closure_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.step needs a closure .* optimizer.step\(closure\)"):
        getattr(distopt, name)([nn.Parameter(torch.zeros(2))]).step()


@pytest.mark.parametrize("name", DRIVERS.values())
def test_what_cannot_be_served_is_refused_with_the_remedy(name: str) -> None:
    cls, param = getattr(distopt, name), nn.Parameter(torch.zeros(2))
    for option in ("offload", "state_codec", "max_grad_norm", "step_in_backward"):
        with pytest.raises(TypeError, match=f"{name} has no option '{option}'.*leave the option out"):
            cls([param], **{option: "cpu"})
    with pytest.raises(ValueError, match="takes one group, got 2"):
        cls([{"params": [param]}, {"params": [nn.Parameter(torch.zeros(2))]}])
    with pytest.raises(ValueError, match="lr must be"):
        cls([param], lr=0.0)
    with pytest.raises(ValueError, match=r"torch.bfloat16.*float32"):
        _ = cls([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]).state
    with pytest.raises(ValueError, match=r"no parameter has a gradient"):
        cls([param]).step(lambda: 1.0)

    optimizer = cls([param])

    def closure() -> float:
        param.grad = torch.full((2,), torch.nan)
        return 1.0

    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.step(closure)
    assert torch.equal(param, torch.zeros(2))


def test_numbers_out_of_range_are_refused() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    for make, message in (
        (lambda: distopt.LBFGS(params, max_iter=0), "max_iter must be ≥ 1"),
        (lambda: distopt.LBFGS(params, line_search_fn="armijo"), "'strong_wolfe' or None, got 'armijo'"),
        (lambda: distopt.LBFGS(params, history_size=0), "history_size must be ≥ 1"),
        (lambda: distopt.MLBFGS(params, bounds=(2, 3)), "bounds must be"),
        (lambda: distopt.MLBFGS(params, damping=0), "damping must lie in"),
        (lambda: distopt.StochasticLBFGS(params, damping=-1), "damping must be ≥ 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    large = [nn.Parameter(torch.zeros(2049))]
    for cls in (distopt.BFGS, distopt.SR1):
        with pytest.raises(ValueError, match="2,049 parameters, at most 2,048; use LBFGS"):
            _ = cls(large).state


def alone() -> list[str]:
    """Warnings of a plain parameter without process_group, and with it."""
    found = []
    for group in (None, dist.group.WORLD):
        param = nn.Parameter(torch.zeros(2))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            _ = distopt.LBFGS([("weight", param)], process_group=group).state
        found.append("; ".join(str(w.message) for w in seen))
    return found


def test_replicas_without_their_group_are_warned() -> None:
    for without, given in pool(2).run(f"{HERE}:alone"):
        assert "replicas (DDP) must give process_group=" in without
        assert given == ""


def disagreeing() -> None:
    laid = lay_out(LAYOUTS["distributed"], first_weights("logistic"))
    distopt.LBFGS(laid.named(), lr=1 + dist.get_rank()).state  # noqa: B018


def test_ranks_that_disagree_are_told() -> None:
    with pytest.raises(Exception, match="ranks disagree") as error:
        pool(2).run(f"{HERE}:disagreeing")
    assert set(error.value.errors) == {0, 1}
