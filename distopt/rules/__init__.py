"""The table of rules: one line each. A rule is one file here.

When each family pays, and when it does not; "tuned" says that the rule it was compared with had its own sweep. Where to start
is in each rule's docstring.

Adaptive, elementwise (adam, adamw, nadam, adagrad, rmsprop, adadelta, lion, ademamix, mars, signum, sophia_g, sophia_h): the
default for anything, and the ones that a fused kernel steps. 4 to 12 bytes per parameter. AdamW is the one to beat, and beaten
by less than papers say once it is tuned: at most 1.4 times at 0.1B parameters, about 1.1 at 1.2B (arXiv 2509.02046). AdEMAMix and
MARS lead the elementwise ones at 124M (arXiv 2509.01440), for one more moment; Lion and Signum want large batches; Sophia was
unstable on long runs there.

Fewer bytes by statistics (adafactor, came, sm3, adam_mini, adalomo, amos): a row and a column, or a number per row or head, in
the place of a second moment. They pay where states do not fit. What they save, 8-bit states (`state_codec`) save as well, at
AdamW's quality and on any rule. Amos had .49 in AlgoPerf's external tuning, below the baseline's .57.

Trust ratios (lars, lamb): steps scaled by the norm of each weight, for batches of ten thousands. No advantage is known at
ordinary ones.

Whole matrices, orthogonalized (muon, muon_clip, normuon, dion, dion2, scion): 4 bytes per parameter of hidden matrices. They
gain most at small scale (validation loss at 130M and one Chinchilla: AdamW 3.529, Muon 3.463; at eight: 3.261 and 3.238, arXiv
2509.02046). They cost products of the order of the weights, and an exchange where matrices are sharded (`distopt plan`).
muon_clip bounds attention logits; dion moves less where links are slow.

Whole matrices, preconditioned (shampoo, caspr, kl_shampoo, soap, psgd_kron): factors of each side, so 9 to 14 bytes per
parameter, and eigenvectors or roots of cubic cost every few steps, in turns. SOAP is about where Muon is (3.482 above), with its
advantage on small batches; Shampoo won AlgoPerf's external tuning (.78), CASPR had .47. Refreshing every 10 steps in the place
of every step costs .005.

Low rank (galore, apollo, apollo_mini): moments in a subspace of each matrix, 0 to 1.5 bytes per parameter. GaLore came near
full rank on C4 (60M: 34.88 against 34.06 in perplexity), where that AdamW was under-tuned (30.05 elsewhere).

Without a schedule or a rate (schedule_free_sgd, schedule_free_adamw, prodigy, schedule_free_prodigy): where the length of
training is not known, or nobody can tune. AlgoPerf's external tuning: Schedule-Free AdamW .71, Schedule-Free Prodigy 0.

Without states (sgd, lomo): convolutions with a schedule; fine-tuning where not even gradients fit.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from distopt.rule import Rule

RULES = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "lion": "Lion",
    "adam": "Adam",
    "nadam": "NAdam",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adadelta": "Adadelta",
    "signum": "Signum",
    "ademamix": "AdEMAMix",
    "lars": "LARS",
    "lamb": "LAMB",
    "sm3": "SM3",
    "came": "CAME",
    "amos": "Amos",
    "mars": "MARS",
    "adam_mini": "AdamMini",
    "schedule_free_sgd": "ScheduleFreeSGD",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "prodigy": "Prodigy",
    "schedule_free_prodigy": "ScheduleFreeProdigy",
    "adafactor": "Adafactor",
    "muon": "Muon",
    "normuon": "NorMuon",
    "dion2": "Dion2",
    "shampoo": "Shampoo",
    "caspr": "CASPR",
    "kl_shampoo": "KLShampoo",
    "soap": "SOAP",
    "galore": "GaLore",
    "apollo": "APOLLO",
    "apollo_mini": "APOLLOMini",
    "scion": "Scion",
    "dion": "Dion",
    "sophia_g": "SophiaG",
    "sophia_h": "SophiaH",
    "muon_clip": "MuonClip",
    "psgd_kron": "PSGDKron",
    "lomo": "LOMO",
    "adalomo": "AdaLomo",
}
"""Name → class; the file has the name."""


def rule_class(name: str) -> type[Rule]:
    """The rule of this name, which is imported when it is first asked for.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name not in RULES:
        raise ValueError(f"no rule is called {name!r}{nearest(name, RULES)} (known: {', '.join(RULES)})")
    return getattr(importlib.import_module(f"distopt.rules.{name}"), RULES[name])


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name that is not known: which one was meant, if any is near."""
    near = get_close_matches(str(name).lower(), known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def group_rule(group: dict[str, Any]) -> Rule:
    """The rule of a group with its present hyperparameters, checked."""
    cls = rule_class(group["rule"])
    rule = cls(**{f.name: _plain(group[f.name]) for f in fields(cls)})
    rule.check()
    return rule


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value
