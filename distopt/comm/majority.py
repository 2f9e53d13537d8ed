"""Majority vote in place of DDP's gradient mean: one bit per element there, one back (Bernstein et al., 2018, arXiv
1802.04434, algorithm 3; 2019, arXiv 1810.05291).

    vote = MajorityVote(momentum=0.9)                 # a fresh one per model
    ddp.register_comm_hook(vote, majority_vote)
    optimizer = distopt.Signum(ddp.parameters(), lr=1e-4, momentum=0)

The gradients that the optimizer sees are +1 and −1. lr then is the size of every step of every coordinate.
"""

# No postponed annotations: DDP compares those of a hook with the classes themselves.

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # where it is typed

from distopt.comm.groups import Domain, Traffic


class MajorityVote:
    """What the hook keeps.

    Every rank counts the votes for one part of a bucket: an all-to-all of packed sign bits there, one of the packed result
    back, together 1/32 of what an fp32 all-reduce moves. Beside them each rank tells each other one byte per bucket: whether
    its gradient is finite. If one is not, all get NaN, which the optimizer's own check finds.

    Ties, and zeros where they vote, go up and down in turns: up where element and step number are both even or both odd.
    Every rank decides alike, and a coordinate that nobody moves ends where it was after two steps.

    Args:
        momentum: share of a running mean of the rank's own gradients that stays at each step; its sign is what a rank votes
            with. 0: the gradient's. It is not part of any checkpoint: a resumed run starts it anew.
        process_group: of the DDP module; None: the default group.
    """

    def __init__(self, momentum: float = 0.0, process_group: dist.ProcessGroup | None = None) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.momentum, self.step, self.traffic = momentum, 0, Traffic()
        group = process_group or dist.group.WORLD
        assert group is not None
        self.domain = Domain(tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), group, self.traffic)
        self._means: dict[int, Tensor] = {}  # by parameter: DDP rearranges its buckets after the first step

    def mean(self, param: Tensor, grad: Tensor) -> Tensor:
        """What this rank votes with for one parameter."""
        if not self.momentum:
            return grad
        if id(param) not in self._means:
            self._means[id(param)] = torch.zeros_like(grad, dtype=torch.float32)
        return self._means[id(param)].lerp_(grad.float(), 1 - self.momentum)


def majority_vote(state: MajorityVote, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: replaces a bucket of gradients by the signs that most ranks voted for, in its dtype."""
    grads = bucket.buffer()
    finite = bool(grads.isfinite().all())
    if state.momentum and finite:
        means = [state.mean(param, grad) for param, grad in zip(bucket.parameters(), bucket.gradients())]
        votes = torch.cat([mean.flatten() for mean in means])
    else:
        votes = grads
    signs, everywhere = _count(votes, finite, state)
    if bucket.is_last():
        state.step += 1
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(torch.where(signs, 1.0, -1.0).to(grads) if everywhere else torch.full_like(grads, torch.nan))
    return done


def _count(votes: Tensor, finite: bool, state: MajorityVote) -> tuple[Tensor, bool]:
    """(which elements most ranks are for, whether all ranks' gradients are finite)."""
    domain, device = state.domain, votes.device
    part = -(-votes.numel() // (8 * domain.size))  # bytes of each rank's part
    up = (torch.arange(8 * part * domain.size, device=device) + state.step) % 2 == 0
    bits = up.clone()
    bits[: votes.numel()] = (votes > 0) | ((votes == 0) & up[: votes.numel()])
    flag = torch.full((domain.size, 1), finite, dtype=torch.uint8, device=device)
    ballots = _exchange(domain, torch.cat([_packed(bits).view(domain.size, part), flag], 1))
    counts = torch.zeros(8 * part, dtype=torch.int32, device=device)
    for ballot in ballots[:, :-1]:
        counts += _unpacked(ballot)
    mine = up[8 * part * domain.me : 8 * part * (domain.me + 1)]
    result = (2 * counts > domain.size) | ((2 * counts == domain.size) & mine)
    gathered = _exchange(domain, _packed(result).expand(domain.size, part).contiguous())
    return _unpacked(gathered.flatten())[: votes.numel()].bool(), bool(ballots[:, -1].all())


def _exchange(domain: Domain, rows: Tensor) -> Tensor:
    """Row i to rank i, and what the ranks sent here. The own row does not travel."""
    others = [rank for rank in range(domain.size) if rank != domain.me]
    splits = [0 if rank == domain.me else rows.shape[1] for rank in range(domain.size)]
    received = torch.empty_like(rows[others]).flatten()
    if others:
        work = domain.all_to_all(received, rows[others].flatten(), splits, splits)
        assert work is not None
        work.wait()
    found = rows.clone()
    found[others] = received.view(len(others), -1)
    return found


def _packed(bits: Tensor) -> Tensor:
    """(8 n,) booleans → (n,) bytes."""
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * places).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """(n,) bytes → (8 n,) zeros and ones."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).flatten()
