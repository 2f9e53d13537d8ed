"""Schedule-Free Prodigy against the naive reference; no package has this combination."""

from functools import partial

from tests.cases import SUMS, Case, Oracle
from tests.cases.prodigy import VARIANTS
from tests.references.prodigy import prodigy

CASE = Case(
    optimizer="ScheduleFreeProdigy",
    variants=VARIANTS,
    oracles=(
        Oracle(name="reference", run=partial(prodigy, schedule_free=True), rel=2e-6, why="float32 sums and rounding"),
    ),
    alone=True,
    sharded=SUMS,
)
