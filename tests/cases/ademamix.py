"""AdEMAMix against pytorch_optimizer's and the naive reference."""

from pytorch_optimizer import AdEMAMix

from tests.cases import ELEMENTWISE, Case, Options, Oracle, against
from tests.references.ademamix import ademamix


def theirs(options: Options) -> Options:
    """One warmup for alpha and beta3; decay as bitsandbytes'."""
    both = {name: value for name, value in options.items() if name not in ("t_alpha", "t_beta3")}
    return {"weight_decay": 1e-2, "weight_decouple": True, "t_alpha_beta3": options.get("t_alpha"), **both}


CASE = Case(
    optimizer="AdEMAMix",
    variants={
        "default": {},
        "warmup": {"lr": 0.01, "betas": (0.8, 0.95, 0.999), "alpha": 8.0, "t_alpha": 6, "t_beta3": 6},
    },
    oracles=(
        Oracle(name="reference", run=ademamix, rel=2e-6, why="float32 rounding of the weights, 1.3e-6 measured"),
        against(AdEMAMix, theirs, rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
