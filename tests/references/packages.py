"""Public packages whose constructors or steps are not torch.optim's, called as the naive references are."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from unittest.mock import patch

import pytorch_optimizer
import torch
from adam_mini import Adam_mini  # type: ignore[import-untyped]
from apollo_torch import APOLLOAdamW  # type: ignore[import-untyped]
from galore_torch import GaLoreAdamW  # type: ignore[import-untyped]
from pytorch_optimizer.optimizer.scion import LMONorm
from torch import Tensor, nn

from tests.cases import Options, public, without


def galore_torch(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """Rank, gap and scale belong to the group of projected parameters."""
    projected = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}
    group = {name: options.pop(name, value) for name, value in projected.items()} | {"proj_type": "std"}
    options.pop("synchronous")  # as it is

    def build(params: list[nn.Parameter], **chosen: Any) -> torch.optim.Optimizer:
        own = group if weight.ndim == 2 else {}
        return GaLoreAdamW([{"params": params} | own], no_deprecation_warning=True, **chosen)

    return public(build)(weight, grads, **options)


def apollo_torch(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """Its first parameter has seed 1; the seeds after that are counted here, as ours are."""
    projected = {"rank": 256, "update_proj_gap": 200, "scale": 1.0, "scale_type": "channel"}
    group = {name: options.pop(name, value) for name, value in projected.items()} | {
        "proj": "random",
        "proj_type": "std",
    }

    def build(params: list[nn.Parameter], **chosen: Any) -> torch.optim.Optimizer:
        return APOLLOAdamW([{"params": params} | (group if weight.ndim == 2 else {})], **chosen)

    with patch("apollo_torch.random_projector.next_seed", lambda seed: seed + 1):
        return public(build)(weight, grads, **options)


def scion_options(options: Options) -> Options:
    """The authors' names: momentum is the weight of the new gradient."""
    return {
        "lr": options.get("lr", 1e-3),
        "momentum": 1 - options.get("momentum", 0.9),
        "constraint": not options.get("unconstrained", False),
        "norm_type": LMONorm.SIGN if options.get("norm") == "sign" else LMONorm.AUTO,
        "scale": options.get("scale", 50.0),
    }


def fused_lomo(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """It steps in the backward pass of a model."""
    return _fused(pytorch_optimizer.LOMO, weight, grads, {"lr": 1e-3, **options})


def fused_adalomo(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """Without its loss scale; it has two numbers for eps."""
    eps1, eps2 = options.pop("eps", (1e-30, 1e-3))
    options = {"lr": 1e-3, "loss_scale": 0.0, "eps1": eps1, "eps2": eps2, **options}
    return _fused(pytorch_optimizer.AdaLOMO, weight, grads, options)


def _fused(cls: type, weight: Tensor, grads: Sequence[Tensor], options: Options) -> Tensor:
    model = nn.ParameterList([nn.Parameter(weight.clone())])
    optimizer = cls(model, **options)
    for grad in grads:
        optimizer.fused_backward((model[0] * grad).sum(), lr=options["lr"])
    return model[0].detach()


def sophia_h(
    weight: Tensor, grads: Sequence[Tensor], observed: dict[int, Tensor] | None = None, **options: Any
) -> Tensor:
    """It clips m / h at p, which is p times our step; and takes the estimate with the step."""
    chosen = {"lr": 1e-4, "betas": (0.96, 0.99), "rho": 0.01, "weight_decay": 0.1, **options}
    rho = chosen["rho"]
    param = nn.Parameter(weight.clone())
    scaled = {"lr": chosen["lr"] / rho, "weight_decay": chosen["weight_decay"] * rho}
    optimizer = pytorch_optimizer.SophiaH(
        [param], betas=chosen["betas"], p=rho, eps=1e-15, update_period=10**9, **scaled
    )
    for step, grad in enumerate(grads):
        param.grad = grad.clone()
        # Without an estimate its first step would compute one; zero changes nothing then.
        shown = (observed or {}).get(step, torch.zeros_like(weight) if step == 0 else None)
        optimizer.step(hessian=None if shown is None else [shown])
    return param.detach()


def kron(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """It draws its probes from the global generator, and balances by chance."""
    seeds = count(options.pop("seed", 0) + 1)

    def probe(like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(next(seeds))).to(dtype)

    def build(params: list[nn.Parameter], **chosen: Any) -> torch.optim.Optimizer:
        return pytorch_optimizer.Kron(params, balance_prob=0.0, **chosen)

    with patch("torch.randn_like", probe):
        return public(build)(weight, grads, **options)


def in_training(cls: Callable[..., Any]) -> Callable[..., torch.optim.Optimizer]:
    """schedulefree's begin in evaluation mode."""

    def build(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(params, **options)
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return build


def named_adam_mini(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """It decides by names: per row in an MLP, one block for what it does not know."""
    named_parameters = [("mlp.weight" if param.ndim > 1 else "scale", param) for param in params]
    return Adam_mini(named_parameters, dim=8, n_heads=1, verbose=False, **options)


def normuon_of_pytorch_optimizer(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """Its groups say which rule they want; its two scales are ours with a name."""
    scale = "match_rms" if options.get("adjust_lr_fn", "rms") == "rms" else "preserve_norm"
    defaults = {"lr": 1e-3, "weight_decay": 0.1, "nesterov": False, "eps": 1e-8, "update_scale": scale}

    def build(params: list[nn.Parameter], **chosen: Any) -> torch.optim.Optimizer:
        return pytorch_optimizer.NorMuon([{"params": params, "use_muon": True}], **chosen)

    return public(build)(weight, grads, **defaults | without("ns_dtype", "adjust_lr_fn")(options))


def soap_of_pytorch_optimizer(weight: Tensor, grads: Sequence[Tensor], **options: Any) -> Tensor:
    """It has another name for the longest preconditioned dim, and refreshes all at once."""
    renamed = {{"max_precond_dim": "max_precondition_dim"}.get(name, name): value for name, value in options.items()}
    return public(pytorch_optimizer.SOAP)(weight, grads, **without("synchronous")(renamed))
