"""Majority vote over DDP gradients: its result against a count of signs, its bytes counted at the collectives."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.comm.majority import MajorityVote, majority_vote
from tests.distributed.pool import pool

HERE = __name__


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 37, bias=False))


def inputs(rank: int, step: int) -> Tensor:
    return torch.randn(8, 300, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(module: nn.Module, rank: int, step: int) -> Tensor:
    return module(inputs(rank, step)).square().mean()


def voted(momentum: float, steps: int, bucket_mb: float) -> tuple[list[list[Tensor]], int, int, int]:
    """Gradients of each step; bytes that left this rank in the last one, as counted here and as the hook counted; elements."""
    rank = dist.get_rank()
    ddp = DistributedDataParallel(model(), bucket_cap_mb=bucket_mb)
    vote = MajorityVote(momentum)
    ddp.register_comm_hook(vote, majority_vote)
    sent = 0
    real = dist.all_to_all_single

    def counting(received: Tensor, sending: Tensor, receive: list[int], send: list[int], **kwargs: Any) -> Any:
        nonlocal sent
        sent += sending.element_size() * sum(count for to, count in enumerate(send) if to != rank)
        return real(received, sending, receive, send, **kwargs)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("no other collective carries gradients")

    kept = dist.all_reduce, dist.all_gather
    dist.all_to_all_single, dist.all_reduce, dist.all_gather = counting, refused, refused
    try:
        gradients = []
        for step in range(steps):
            ddp.zero_grad()
            sent = vote.traffic.sent = 0
            loss_of(ddp, rank, step).backward()
            gradients.append([param.grad.clone() for param in ddp.parameters()])
    finally:
        dist.all_to_all_single, (dist.all_reduce, dist.all_gather) = real, kept
    return gradients, sent, vote.traffic.sent, sum(p.numel() for p in ddp.parameters())


def expected(size: int, momentum: float, steps: int) -> list[list[tuple[Tensor, Tensor]]]:
    """(sign of the sum of signs, whether it is a tie or somebody's vote hangs on rounding) of each step and parameter."""
    module = model()
    means: list[list[Tensor]] = [[torch.zeros_like(p) for p in module.parameters()] for _ in range(size)]
    found = []
    for step in range(steps):
        for rank in range(size):
            grads = torch.autograd.grad(loss_of(module, rank, step), list(module.parameters()))
            means[rank] = [momentum * m + (1 - momentum) * g for m, g in zip(means[rank], grads)]
        columns = [torch.stack(column) for column in zip(*means)]
        near_zero = [(column.abs() < 1e-5 * column.abs().max()).any(0) for column in columns]
        sums = [column.sign().sum(0) for column in columns]
        found.append([(total.sign(), (total == 0) | near) for total, near in zip(sums, near_zero)])
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_every_rank_gets_the_sign_of_most(size: int, momentum: float) -> None:
    answers = pool(size).run(f"{HERE}:voted", momentum, 4, 0.1)
    for step, names in enumerate(expected(size, momentum, 4)):
        for number, (signs, open_) in enumerate(names):
            grads = [gradients[step][number] for gradients, *_ in answers]
            assert all(torch.equal(grad, grads[0]) for grad in grads)
            assert torch.equal(grads[0].abs(), torch.ones_like(grads[0]))
            assert torch.equal(grads[0][~open_], signs[~open_])
            assert (~open_).sum() > 0.3 * open_.numel()


@pytest.mark.parametrize("size", [2, 4])
def test_one_bit_travels_for_each_float(size: int) -> None:
    """Against what an fp32 all-reduce moves: every rank sends (N − 1)/N of the buffer in each of two phases."""
    for _, sent, counted, numel in pool(size).run(f"{HERE}:voted", 0.0, 1, 25.0):
        all_reduce = 2 * (size - 1) / size * 4 * numel
        assert sent == counted
        assert sent / all_reduce == pytest.approx(1 / 32, rel=0.002)
        part = -(-numel // (8 * size))
        assert sent == (size - 1) * (2 * part + 1)


def tied(values: list[list[float]]) -> list[Tensor]:
    """Three steps on given gradients."""
    param = nn.Parameter(torch.zeros(len(values[0])))
    holder = nn.Module()
    holder.register_parameter("w", param)
    holder.forward = lambda scale: (param * scale).sum()  # type: ignore[assignment]
    ddp = DistributedDataParallel(holder)
    ddp.register_comm_hook(MajorityVote(), majority_vote)
    found = []
    for _ in range(3):
        ddp.zero_grad()
        ddp(torch.tensor(values[dist.get_rank()])).backward()
        assert param.grad is not None
        found.append(param.grad.clone())
    return found


def test_ties_and_zeros_alternate_alike_on_every_rank() -> None:
    for first, second, third in pool(2).run(f"{HERE}:tied", [[1.0, 1.0, 0.0, 0.0, 2.0], [-1.0, -3.0, 0.0, 0.0, 3.0]]):
        assert first.tolist() == [1, -1, 1, -1, 1]
        assert second.tolist() == [-1, 1, -1, 1, 1]
        assert torch.equal(third, first)


def test_a_gradient_that_is_not_finite_reaches_every_rank() -> None:
    for steps in pool(2).run(f"{HERE}:tied", [[1.0, float("inf")], [1.0, 1.0]]):
        assert steps[0].isnan().all()


def trained(steps: int) -> tuple[float, float, list[Tensor]]:
    """Signum on voted signs: first and last loss of all ranks' data, and the weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ddp = DistributedDataParallel(model())
    ddp.register_comm_hook(MajorityVote(momentum=0.9), majority_vote)
    optimizer = distopt.Signum(ddp.parameters(), lr=1e-4, momentum=0)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, rank, step % 3).backward()
        optimizer.step()
    with torch.no_grad():
        losses = [sum(loss_of(m, r, 0).item() for r in range(size)) for m in (model(), ddp.module)]
    return losses[0], losses[1], [param.detach().clone() for param in ddp.parameters()]


def test_signum_trains_on_votes_and_replicas_stay_equal() -> None:
    answers = pool(2).run(f"{HERE}:trained", 60)
    for before, after, weights in answers:
        assert after < 0.5 * before
        assert all(torch.equal(a, b) for a, b in zip(weights, answers[0][2]))


def test_momentum_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum must lie in"):
        MajorityVote(momentum=1.0)
