"""Schedule-Free Prodigy against the naive reference; no package has this combination."""

from functools import partial

from tests.cases import Case, Oracle
from tests.cases.prodigy import VARIANTS
from tests.references.prodigy import prodigy

CASE = Case(
    optimizer="ScheduleFreeProdigy",
    ndims=frozenset({0, 1, 2, 3}),
    variants=VARIANTS,
    oracles=(
        Oracle(name="reference", run=partial(prodigy, schedule_free=True), rel=2e-6, why="float32 sums and rounding"),
    ),
    alone=True,
    sharded=1e-6,
    sharded_why="sums in another order",
)
