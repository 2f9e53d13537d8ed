"""Naive references, written from the papers: one parameter, its gradients in order, the weight after the last one.

Every reference is `rule(weight, grads, *, lr=…, …) -> weight` on plain tensors of any float dtype; float64 is what the
tight tolerances are measured against. They are slow, keep no state between calls and share no code with the package.
"""

from tests.references.adafactor import adafactor
from tests.references.adamw import adamw
from tests.references.caspr import caspr
from tests.references.dion2 import dion2
from tests.references.kl_shampoo import kl_shampoo
from tests.references.lion import lion
from tests.references.muon import muon, newton_schulz, polar_express
from tests.references.normuon import normuon
from tests.references.sgd import sgd
from tests.references.shampoo import shampoo
from tests.references.soap import soap

__all__ = [
    "adafactor",
    "adamw",
    "caspr",
    "dion2",
    "kl_shampoo",
    "lion",
    "muon",
    "newton_schulz",
    "normuon",
    "polar_express",
    "sgd",
    "shampoo",
    "soap",
]
