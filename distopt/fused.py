"""Weights of known transformers models that are several logical matrices, or are stored transposed.

Which these are is read off the module that holds a weight, its class and the config: never off a shape alone, which
cannot tell how a fused projection lies. What is not known stays one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from distopt.layouts import global_shape
from distopt.names import PREFIXES, strip_prefixes

IN_ORDER = ("Phi3", "Phi4Multimodal")
"""Classes whose qkv_proj has all queries, then all keys, then all values."""
GATE_FIRST = (*IN_ORDER, "Glm", "Dia")
"""Classes whose gate_up_proj has the gate in its first half."""
BY_HEAD = ("GPTNeoX", "Bloom", "Falcon")
"""Classes whose query_key_value has the query, key and value of one head (or group of heads) after the other."""


def known_splits(model: nn.Module, *, per_head: bool = False) -> dict[str, str]:
    """Splits by the name of the weight, for the modules of `model` that are known.

    Fused projections are split into their parts: queries, keys and values are different maps with scales of their own,
    and so are gate and up, so that one orthogonalization or one factor for all of them would couple their spectra. With
    `per_head` so are the heads of attention, of output projections along the columns.
    """
    found: dict[str, str] = {}
    for parent, name, module, key, config in _weights(model):
        words = _split_of(parent, name, module, config, per_head=per_head)
        if words:
            found[key] = words
    return found


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, str, Any]]:
    """(module that uses it, its name there, tensor or module, full name of the weight, nearest config), over wrappers."""
    modules = dict(model.named_modules())
    configs: dict[str, Any] = {}
    for path, module in modules.items():
        above = configs.get(path.rpartition(".")[0]) if path else None
        configs[path] = getattr(module, "config", None) or above
        names = [part for part in path.split(".") if part and part not in PREFIXES - {"module"}]
        for leaf, param in module.named_parameters(recurse=False):
            full = strip_prefixes(f"{path}.{leaf}" if path else leaf)
            if leaf == "weight" and names:
                user = modules[_above(path)]
                yield user, names[-1], module, full, configs[path]
            elif len(global_shape(param)) == 3:
                yield module, leaf, param, full, configs[path]


def _above(path: str) -> str:
    """The path of the module that uses the one at `path`: its parent, not counting what wrappers insert."""
    path = path.rpartition(".")[0]
    while path.rpartition(".")[2] in PREFIXES - {"module"}:
        path = path.rpartition(".")[0]
    return path


def _split_of(parent: nn.Module, name: str, module: Any, config: Any, *, per_head: bool) -> str | None:
    """The words for one weight, or None."""
    words = "transposed" if type(module).__name__ == "Conv1D" else ""
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int):
        groups = getattr(config, "num_key_value_heads", None) or heads
        parts, words = _attention(parent, name, words, heads, groups, config, per_head=per_head)
    else:
        parts = ""
    if name == "gate_up_proj":
        parts, words = _gate_up(parent, module, words)
    elif getattr(parent, "is_transposed", False) and name == "down_proj":
        words = "transposed"
    return " ".join(filter(None, (words, parts))) or None


def _attention(
    parent: nn.Module, name: str, words: str, heads: int, groups: int, config: Any, *, per_head: bool
) -> tuple[str, str]:
    """(parts, other words) of a projection of attention."""
    each = f"q:{heads}h,k:{groups}h,v:{groups}h"
    head = " per_head" if per_head else ""
    if name == "qkv_proj" and _is(parent, IN_ORDER):
        return each + head, words
    if name == "c_attn" and _is(parent, ("GPT2",)):
        parts = f"k:{heads}h,v:{heads}h" if hasattr(parent, "q_attn") else f"q:{heads}h,k:{heads}h,v:{heads}h"
        return parts + head, words
    if name == "query_key_value" and _is(parent, BY_HEAD):
        return _by_head(parent, heads, config) + head, words
    if not per_head:
        return "", words
    siblings = {child for child, _ in parent.named_children()}
    if {"q_proj", "k_proj", "v_proj"} <= siblings and name in ("q_proj", "k_proj", "v_proj"):
        return f"{name[0]}:{heads if name == 'q_proj' else groups}h per_head", words
    fused = {"q_proj", "qkv_proj", "query_key_value", "c_attn"} & siblings
    if fused and name in ("o_proj", "dense", "c_proj"):
        return f"o:{heads}h cols per_head", words
    return "", words


def _by_head(parent: nn.Module, heads: int, config: Any) -> str:
    """The parts of a query_key_value. Falcon has three orders."""
    if getattr(config, "new_decoder_architecture", False):
        groups = config.num_kv_heads
        return f"q:{heads}h,k:{groups}h,v:{groups}h interleaved={groups}"
    if _is(parent, ("Falcon",)) and config.multi_query:
        return f"q:{heads}h,k:1h,v:1h"
    return f"q:{heads}h,k:{heads}h,v:{heads}h interleaved={heads}"


def _gate_up(parent: nn.Module, module: Any, words: str) -> tuple[str, str]:
    """(parts, other words) of a gate_up_proj, of an MLP or of experts."""
    if isinstance(module, nn.Module):
        return ("gate,up" if _is(parent, GATE_FIRST) else ""), words
    if not hasattr(parent, "is_transposed"):  # experts that do not say how they lie
        return "", words
    parts = "gate,up"
    if not getattr(parent, "is_concatenated", True):
        parts += f" interleaved={global_shape(module)[-1 if parent.is_transposed else -2] // 2}"
    return parts, "transposed" if parent.is_transposed else words


def _is(module: nn.Module, families: tuple[str, ...]) -> bool:
    """Whether a module's class, or the one it was made of by a wrapper, belongs to one of these families."""
    return any(base.__name__.startswith(families) for base in type(module).__mro__)
