"""Names and shapes of the parameters of well-known models, as data: nothing is downloaded and no model is built.

Linear weights are (out, in), as in nn.Linear. A weight that is used twice appears once, under its first name.
"""

Shapes = dict[str, tuple[int, ...]]


def gpt2_124m() -> Shapes:
    """GPT-2 small, 124,439,808 parameters: 12 layers of width 768, the head tied to the embedding.

    Names are those of the Hugging Face model, whose Conv1D weights are stored (in, out); here they are (out, in).
    """
    shapes: Shapes = {"transformer.wte.weight": (50257, 768), "transformer.wpe.weight": (1024, 768)}
    for layer in range(12):
        block = {
            **_norm("ln_1", 768),
            **_linear("attn.c_attn", 2304, 768),
            **_linear("attn.c_proj", 768, 768),
            **_norm("ln_2", 768),
            **_linear("mlp.c_fc", 3072, 768),
            **_linear("mlp.c_proj", 768, 3072),
        }
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | _norm("transformer.ln_f", 768)


def llama3_8b() -> Shapes:
    """Llama 3 8B, 8,030,261,248 parameters: 32 layers of width 4096, 8 key-value heads, no biases, untied head."""
    shapes: Shapes = {"model.embed_tokens.weight": (128256, 4096)}
    for layer in range(32):
        block: Shapes = {
            "self_attn.q_proj.weight": (4096, 4096),
            "self_attn.k_proj.weight": (1024, 4096),
            "self_attn.v_proj.weight": (1024, 4096),
            "self_attn.o_proj.weight": (4096, 4096),
            "mlp.gate_proj.weight": (14336, 4096),
            "mlp.up_proj.weight": (14336, 4096),
            "mlp.down_proj.weight": (4096, 14336),
            "input_layernorm.weight": (4096,),
            "post_attention_layernorm.weight": (4096,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}


def hidden_matrices(shapes: Shapes) -> Shapes:
    """The matrices that a matrix rule is meant for: neither embedding nor head, norm or bias."""
    outside = ("wte", "wpe", "embed_tokens", "lm_head")
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.split(".")[-2] not in outside}


def _linear(name: str, rows: int, cols: int) -> Shapes:
    return {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}
