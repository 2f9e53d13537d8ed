"""The splits that are found in tiny transformers models, held against what the models compute.

A part is where it is said to be if it does there what its name says: without keys attention is uniform, so queries have
no effect; without values neither has; without a gate the other half of an MLP has none.
"""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import distopt
from distopt.fused import known_splits
from distopt.plan.geometry import logical_of
from distopt.plan.split import parse_split
from distopt.rules.muon import Muon

TINY: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 32, "pad_token_id": 0}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def model_of(name: str) -> nn.Module:
    configs: dict[str, Any] = {
        "llama": lambda: transformers.LlamaConfig(**TINY, **GROUPED),
        "qwen": lambda: transformers.Qwen2Config(**TINY, **GROUPED),
        "mistral": lambda: transformers.MistralConfig(**TINY, **GROUPED, head_dim=8),
        "phi3": lambda: transformers.Phi3Config(**TINY, **GROUPED),
        "glm": lambda: transformers.GlmConfig(**TINY, **GROUPED, head_dim=8),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_layer=2, n_embd=32, n_head=4, n_positions=16),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**TINY, num_attention_heads=4, intermediate_size=48),
        "bloom": lambda: transformers.BloomConfig(vocab_size=40, n_layer=2, hidden_size=32, n_head=4),
        "falcon": lambda: transformers.FalconConfig(**TINY, num_attention_heads=4, multi_query=False, alibi=False),
        "falcon_7b": lambda: transformers.FalconConfig(**TINY, num_attention_heads=4, multi_query=True, alibi=False),
        "falcon_40b": lambda: transformers.FalconConfig(
            **TINY, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, alibi=False
        ),
        "mixtral": lambda: transformers.MixtralConfig(**TINY, **GROUPED, num_local_experts=3, num_experts_per_tok=3),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **TINY,
            **GROUPED,
            head_dim=8,
            num_local_experts=3,
            num_experts_per_tok=3,
            layer_types=["full_attention"] * 2,
        ),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[name](), attn_implementation="eager").eval()
    for key, param in model.named_parameters():
        if "bias" in key:
            nn.init.zeros_(param)
        elif param.ndim > 1:
            nn.init.normal_(param, std=0.3)
    return model


FOUND = {
    "llama": {},
    "qwen": {},
    "mistral": {},
    "phi3": {"self_attn.qkv_proj": "q:4h,k:2h,v:2h", "mlp.gate_up_proj": "gate,up"},
    "glm": {"mlp.gate_up_proj": "gate,up"},
    "gpt2": {
        "attn.c_attn": "transposed q:4h,k:4h,v:4h", "attn.c_proj": "transposed", "mlp.c_fc": "transposed",
        "mlp.c_proj": "transposed",
    },
    "gpt_neox": {"attention.query_key_value": "q:4h,k:4h,v:4h interleaved=4"},
    "bloom": {"self_attention.query_key_value": "q:4h,k:4h,v:4h interleaved=4"},
    "falcon": {"self_attention.query_key_value": "q:4h,k:4h,v:4h interleaved=4"},
    "falcon_7b": {"self_attention.query_key_value": "q:4h,k:1h,v:1h"},
    "falcon_40b": {"self_attention.query_key_value": "q:4h,k:2h,v:2h interleaved=2"},
    "mixtral": {"mlp.experts.gate_up_proj": "gate,up"},
    "gpt_oss": {
        "mlp.experts.gate_up_proj": "transposed gate,up interleaved=48", "mlp.experts.down_proj": "transposed",
    },
}  # fmt: skip


def in_layers(splits: dict[str, str]) -> dict[str, str]:
    """Those of the last layer, by the name within it."""
    found = {}
    for name, words in splits.items():
        _, _, after = name.partition(".1.")
        if after:
            found[after.removesuffix(".weight")] = words
    return found


@pytest.mark.parametrize("name", FOUND)
def test_splits_of_known_models_are_found(name: str) -> None:
    model = model_of(name)
    found = known_splits(model)
    assert in_layers(found) == FOUND[name]
    shapes = {key: tuple(param.shape) for key, param in model.named_parameters()}
    for key, words in found.items():
        logical_of(shapes[key], Muon(), words)


def part_mask(shape: tuple[int, ...], words: str, name: str) -> Tensor:
    """Where a part lies in the stored weight; alike in every expert."""
    logical = logical_of(shape, Muon(), words)
    dim = -1 if logical.transposed else -2
    inside = torch.zeros(shape[dim], dtype=torch.bool)
    for segment in logical.rows.segments:
        if logical.rows.names[segment.part] == name and segment.start < shape[dim]:
            inside[segment.start : segment.stop] = True
    return (inside if dim == -1 else inside[:, None]).expand(shape)


def changed(model: nn.Module, param: nn.Parameter, mask: Tensor) -> bool:
    """Whether the logits depend on these elements."""
    tokens = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        saved = param.clone()
        param[mask] = torch.randn(int(mask.sum()))
        after = model(tokens).logits
        param.copy_(saved)
    return not torch.allclose(before, after, rtol=1e-4, atol=1e-4)


FUSED = [(name, weight, words) for name, found in FOUND.items() for weight, words in found.items() if "," in words]


@pytest.mark.parametrize(("name", "weight", "words"), FUSED)
def test_parts_do_what_their_names_say(name: str, weight: str, words: str) -> None:
    model = model_of(name)
    param = next(p for key, p in model.named_parameters() if key.removesuffix(".weight").endswith(f".1.{weight}"))
    names = [part.name for part in parse_split(words).parts]
    masks = {part: part_mask(tuple(param.shape), words, part) for part in names}
    assert torch.equal(sum(mask.long() for mask in masks.values()), torch.ones(param.shape, dtype=torch.long))
    for part in names:
        assert changed(model, param, masks[part]), f"{part} has no effect at all"
    # What is put to zero, and what then has no effect any more or still has one.
    silenced, deaf, alive = ("k", ["q"], ["v"]) if "q" in names else ("gate", ["up"], ["gate"])
    with torch.no_grad():
        param[masks[silenced]] = 0
    for part in deaf:
        assert not changed(model, param, masks[part]), f"{part} is not where it is said to be"
    for part in alive:
        assert changed(model, param, masks[part]), f"{part} is not where it is said to be"
    if "v" in names:
        with torch.no_grad():
            param[masks["v"]] = 0
        assert not changed(model, param, masks["q"] | masks["k"]), "v is not where it is said to be"


def groups_of(optimizer: distopt.Optimizer) -> dict[str, str | None]:
    return {name: group["split"] for group in optimizer.param_groups for name in group["param_names"]}


def test_create_optimizer_splits_what_it_knows_and_says_so() -> None:
    model = model_of("phi3")
    optimizer = distopt.create_optimizer("muon", model, lr=0.01)
    splits = groups_of(optimizer)
    assert splits["model.layers.0.self_attn.qkv_proj.weight"] == "q:4h,k:2h,v:2h"
    assert splits["model.layers.0.self_attn.o_proj.weight"] is None
    assert splits["model.embed_tokens.weight"] is None
    why = {name: reason for name, _, reason in optimizer.routing}
    assert why["model.layers.0.self_attn.qkv_proj.weight"] == "weight of a hidden Linear; split: q:4h,k:2h,v:2h"
    hidden = [group for group in optimizer.plan.summary()["groups"] if group["rule"] == "Muon"]
    assert sum(group["matrices"] for group in hidden) == 2 * (3 + 1 + 2 + 1)


def test_create_optimizer_leaves_weights_alone_where_told_to() -> None:
    model = model_of("phi3")
    assert set(groups_of(distopt.create_optimizer("muon", model, lr=0.01, find_splits=False)).values()) == {None}
    assert set(groups_of(distopt.create_optimizer("adamw", model, lr=0.01)).values()) == {None}


def test_heads_are_matrices_of_their_own_on_request() -> None:
    def splits(name: str, rule: str, **options: Any) -> dict[str, str]:
        optimizer = distopt.create_optimizer(rule, model_of(name), lr=0.01, **options)
        return in_layers({key: words for key, words in groups_of(optimizer).items() if words})

    assert splits("llama", "muon", per_head=True) == {
        "self_attn.q_proj": "q:4h per_head",
        "self_attn.k_proj": "k:2h per_head",
        "self_attn.v_proj": "v:2h per_head",
        "self_attn.o_proj": "o:4h cols per_head",
    }
    assert splits("gpt_neox", "muon", per_head=True) == {
        "attention.query_key_value": "q:4h,k:4h,v:4h interleaved=4 per_head",
        "attention.dense": "o:4h cols per_head",
    }
    assert splits("llama", "adam_mini") == {"self_attn.q_proj": "q:4h per_head", "self_attn.k_proj": "k:2h per_head"}
    assert splits("phi3", "adam_mini") == {"self_attn.qkv_proj": "q:4h,k:2h,v:2h per_head"}
    assert splits("gpt2", "adam_mini") == {
        "attn.c_attn": "transposed q:4h,k:4h,v:4h per_head",
        "attn.c_proj": "transposed",
        "mlp.c_fc": "transposed",
        "mlp.c_proj": "transposed",
    }


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox", "gpt_oss"])
def test_known_models_train_with_their_splits(name: str) -> None:
    model = model_of(name)
    optimizer = distopt.create_optimizer("muon", model, lr=1e-3)
    tokens = torch.arange(1, 13).view(1, 12)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
