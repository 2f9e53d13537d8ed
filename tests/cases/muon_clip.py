"""MuonClip against Muon's reference with the clip of its paper."""

from tests.cases import BATCHED, MATRICES, Case, Oracle
from tests.references.muon_clip import muon_clip

CASE = Case(
    optimizer="MuonClip",
    ndims=MATRICES,
    observes="max_logit",
    variants={"default": {}, "low": {"lr": 0.01, "tau": 30.0, "alpha": 1.0, "weight_decay": 0.0, "momentum": 0.9}},
    oracles=(Oracle(name="reference", run=muon_clip, rel=1e-5, why="as for Muon"),),
    sharded=BATCHED,
)
