"""The table of rules: one line each. A rule is one file here."""

from __future__ import annotations

import importlib
from dataclasses import fields
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
        import difflib

        near = difflib.get_close_matches(str(name), RULES, n=1)
        raise ValueError(
            f"no rule is called {name!r}{f', did you mean {near[0]!r}?' if near else ''} (known: {', '.join(RULES)})"
        )
    return getattr(importlib.import_module(f"distopt.rules.{name}"), RULES[name])


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
