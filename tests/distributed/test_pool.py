"""The rank pools themselves: what a failing, dying or hanging rank turns into."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import RankError, pool


def total(value: float) -> float:
    tensor = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(tensor)
    return tensor.item()


def process_id() -> int:
    return os.getpid()


def spoil() -> float:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    return torch.rand((), dtype=torch.float32).item()


def state() -> tuple[torch.dtype, int, float]:
    return torch.get_default_dtype(), torch.get_num_threads(), torch.rand(()).item()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("a bad value")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def lone_barrier() -> None:
    if dist.get_rank() != 0:
        dist.barrier()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_takes_part(world_size: int) -> None:
    expected = 0.5 * world_size * (world_size + 1) / 2
    assert pool(world_size).run(f"{__name__}:total", 0.5) == [expected] * world_size


def test_ranks_stay_warm_between_calls_and_start_afresh_in_each() -> None:
    before = pool(2).run(f"{__name__}:process_id")
    drawn = pool(2).run(f"{__name__}:spoil")
    assert pool(2).run(f"{__name__}:state") == [(torch.float32, 1, drawn[0])] * 2
    assert pool(2).run(f"{__name__}:process_id") == before


def test_an_exception_names_its_rank_and_shows_its_traceback() -> None:
    with pytest.raises(RankError, match="failed on rank 1\n") as caught:
        pool(2).run(f"{__name__}:raise_on", 1)
    assert "ValueError: a bad value" in caught.value.errors[1]
    assert "in raise_on" in caught.value.errors[1]
    assert pool(2).run(f"{__name__}:total", 1.0) == [3.0, 3.0]


def test_a_dead_rank_is_reported_and_the_pool_recovers() -> None:
    with pytest.raises(RankError, match="rank 0\ndied with exit code 3"):
        pool(2).run(f"{__name__}:die_on", 0)
    assert pool(2).run(f"{__name__}:total", 1.0) == [3.0, 3.0]


def test_a_hang_ends_at_the_deadline_and_shows_where_it_hangs() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="no answer within 2 s") as caught:
        pool(2).run(f"{__name__}:lone_barrier", deadline=2)
    assert time.monotonic() - start < 10
    assert caught.value.timed_out
    assert "in lone_barrier" in caught.value.errors[1]
    assert pool(2).run(f"{__name__}:total", 1.0) == [3.0, 3.0]
