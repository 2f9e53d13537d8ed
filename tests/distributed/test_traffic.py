"""Bytes on the wire: what the real collectives move is what the plan says, on every kind of layout."""

import pytest

from tests.distributed.pool import pool

ROWS = [
    ("Muon", "fsdp", 4),
    ("Muon", "fsdp-tp", 4),
    ("Muon", "partitioned", 2),
    ("Muon", "flat", 2),
    ("SOAP", "fsdp", 2),
    ("SOAP", "tp", 2),
    ("Adafactor", "fsdp", 4),
    ("Adafactor", "flat-concatenated", 2),
    ("AdamW", "hsdp", 4),
    ("AdamW", "partitioned", 2),
]


@pytest.mark.parametrize(("optimizer", "layout", "world_size"), ROWS)
def test_bytes_of_the_real_collectives_are_the_planned_ones(optimizer: str, layout: str, world_size: int) -> None:
    answers = pool(world_size).run("tests.distributed.traffic:one_step", optimizer, layout)
    assert any(counted["sent"] for counted, _, _ in answers)
    for counted, reported, planned in answers:
        assert counted == reported == planned


def test_exchange_moves_each_element_once_and_nothing_twice() -> None:
    """FSDP2 Muon, 4 ranks: in all 2P(N−1)/N elements, no padding, and the busiest rank near the mean."""
    answers = pool(4).run("tests.distributed.traffic:exchanged")
    elements = answers[0]["elements"]
    total = sum(answer["sent"] for answer in answers)
    assert total == 2 * elements * 3 // 4  # N = 4
    assert sum(answer["received"] for answer in answers) == total
    busiest = max(max(answer["sent"], answer["received"]) for answer in answers)
    assert busiest <= 1.10 * total / 4
