"""Averages of weights: their numbers against torch's and against naive means, one process and four ranks of any layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distopt
from distopt import checkpoint
from distopt.averaging import EMA, LAWA, LAWAEMA, Average
from tests.distributed.layouts import DISTINCT, LAYOUTS, Full, lay_out, local_tensor
from tests.distributed.pool import RankError, pool

HERE = __name__
MAKE: dict[str, Callable[[Any], Average]] = {
    "ema": lambda source: EMA(source, decay=0.8),
    "lawa": lambda source: LAWA(source, num_snapshots=3, every=2),
    "lawa-ema": lambda source: LAWAEMA(source, every=3, decay=0.5),
}


class Holder(nn.Module):
    def __init__(self, params: Full) -> None:
        super().__init__()
        for name, param in params.items():
            self.register_parameter(name, param)  # type: ignore[arg-type]


def weights(step: int, shapes: dict[str, tuple[int, ...]] = DISTINCT) -> Full:
    """The weights after some step of a run, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected(kind: str, steps: int, name: str) -> Tensor:
    """The average after `steps` steps, naively in fp64."""
    values = [weights(step)[name].double() for step in range(1, steps + 1)]
    if kind == "lawa":
        return torch.stack(values[1::2][-3:]).mean(0)
    decay, values = (0.8, values) if kind == "ema" else (0.5, values[2::3])
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    return average


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)


# ---- one process


@pytest.mark.parametrize("kind", MAKE)
def test_averages_are_those_of_a_naive_mean(kind: str) -> None:
    model = Holder({name: nn.Parameter(w) for name, w in weights(0).items()})
    average = MAKE[kind](model)
    for step in range(1, 12):
        for name, param in model.named_parameters():
            param.data.copy_(weights(step)[name])
        average.update()
        if step >= average.every:
            with average.swapped():
                for name, param in model.named_parameters():
                    close(param.detach(), expected(kind, step, name))
        for name, param in model.named_parameters():
            assert torch.equal(param, weights(step)[name])


def test_ema_has_the_numbers_of_torch_swa_utils() -> None:
    model = nn.Linear(7, 5)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = EMA(model, decay=0.9)
    for _ in range(6):
        with torch.no_grad():
            model.weight.normal_()
        ours.update()
        theirs.update_parameters(model)
    with ours.swapped():
        close(model.weight, theirs.module.weight)


def test_weights_come_back_after_an_exception() -> None:
    model = nn.Linear(7, 5)
    average = EMA(model, decay=0.9)
    average.update()
    nn.init.normal_(model.weight)
    before = model.weight.clone()
    with pytest.raises(KeyError, match="True"), average.swapped():
        raise KeyError(not torch.equal(model.weight, before))
    assert torch.equal(model.weight, before)
    average.update()  # and are no longer swapped


def test_an_average_of_bf16_weights_is_kept_in_fp32() -> None:
    param = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    ema, lawa = EMA(Holder({"w": param}), decay=0.999), LAWA(Holder({"w": param}), num_snapshots=200, every=1)
    for step in range(200):
        param.data.fill_(1 + 2.0**-7 * (step > 0))  # the next bf16 number: an average in bf16 would never leave 1
        ema.update()
        lawa.update()
    [(_, _, kept)] = ema.tensors()
    assert kept.dtype == torch.float32
    assert kept[0].item() == pytest.approx(1 + 2.0**-7 * (1 - 0.999**199), rel=1e-6)
    assert next(lawa._averages())[0].item() == pytest.approx(1 + 2.0**-7 * 199 / 200, rel=1e-7)


def test_frozen_weights_are_left_out_and_optimizers_give_their_parameters() -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = distopt.create_optimizer("sgd", model, lr=1.0)
    assert [name for name, _, _ in EMA(model, decay=0.5).tensors()] == ["0.weight"]
    average = EMA(optimizer, decay=0.0)
    model.weight.grad = torch.ones_like(model.weight)
    average.update()
    before = model.weight.detach().clone()
    optimizer.step()
    with average.swapped():
        assert torch.equal(model.weight, before)


def test_state_dicts_continue_the_average() -> None:
    for kind, make in MAKE.items():
        model = Holder({name: nn.Parameter(w) for name, w in weights(0).items()})
        first, second = make(model), make(model)
        for step in range(1, 12):
            for name, param in model.named_parameters():
                param.data.copy_(weights(step)[name])
            (first if step <= 5 else second).update()
            if step == 5:
                second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
        with second.swapped():
            close(model.get_parameter("wide").detach(), expected(kind, 11, "wide"))


def test_misuse_is_refused() -> None:
    model = nn.Linear(4, 3)
    average = LAWA(model, num_snapshots=2, every=3)
    with pytest.raises(ValueError, match="after 0 of every=3 updates"), average.swapped():
        pass
    for _ in range(3):
        average.update()
    with average.swapped():
        with pytest.raises(ValueError, match=r"update\(\) inside swapped\(\)"):
            average.update()
        with pytest.raises(ValueError, match=r"swapped\(\) inside swapped\(\)"), average.swapped():
            pass
    state = average.state_dict()
    with pytest.raises(ValueError, match=r"do not both have \['2.bias', '2.weight'\]"):
        LAWA(model, num_snapshots=3, every=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'0.weight': got shape \(4, 3\), plain, expected shape \(3, 4\)"):
        average.load_state_dict({**state, "0.weight": state["0.weight"].T})
    for make, message in (
        (lambda: EMA(model, decay=1.0), "decay=1.0"),
        (lambda: EMA(model, decay=0.5, every=0), "every=0"),
        (lambda: LAWA(model, num_snapshots=0, every=1), "num_snapshots=0"),
        (lambda: EMA(nn.ReLU(), decay=0.5), "nothing to average"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    model.weight = nn.Parameter(model.weight.detach().clone())
    with pytest.raises(ValueError, match=r"\['weight'\] are other tensors"):
        average.update()


# ---- ranks


def averaged(kind: str, layout: str) -> tuple[list[str], list[str]]:
    """Parameters whose local average is not that of the full weights; whose weights did not come back."""
    laid = lay_out(LAYOUTS[layout], weights(0))
    average = MAKE[kind](Holder(laid.params))
    for step in range(1, 10):
        for name, param in laid.params.items():
            local_tensor(param).detach().copy_(laid.local(name, weights(step)[name]))
        average.update()
    with average.swapped():
        now = {name: local_tensor(param).detach().clone() for name, param in laid.params.items()}
    wrong = [
        name
        for name, value in now.items()
        if not torch.allclose(value.double(), laid.local(name, expected(kind, 9, name)), rtol=1e-6, atol=1e-6)
    ]
    lost = [n for n, p in laid.params.items() if not torch.equal(local_tensor(p), laid.local(n, weights(9)[n]))]
    return wrong, lost


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("layout", ["fsdp", "columns", "flat", "distributed-replicate"])
def test_averages_of_shards_are_shards_of_the_average(kind: str, layout: str) -> None:
    for wrong, lost in pool(4).run(f"{HERE}:averaged", kind, layout):
        assert wrong == []
        assert lost == []


def saved(kind: str, layout: str, path: Path) -> None:
    """Five steps, then both checkpoints."""
    laid = lay_out(LAYOUTS[layout], weights(0))
    model = Holder(laid.params)
    average = MAKE[kind](model)
    for step in range(1, 6):
        for name, param in laid.params.items():
            local_tensor(param).detach().copy_(laid.local(name, weights(step)[name]))
        average.update()
    optimizer = distopt.SGD(laid.named(), lr=0.1)
    checkpoint.save(path / "native", model=model, optimizer=optimizer, averages={kind: average})
    dcp.save({"average": average.state_dict()}, checkpoint_id=path / "torch")


def loaded(kind: str, layout: str, path: Path, source: str) -> list[str]:
    """A fresh average that loads them and goes on; parameters whose average is wrong in the end."""
    laid = lay_out(LAYOUTS[layout], weights(0))
    model = Holder(laid.params)
    average = MAKE[kind](model)
    if source == "native":
        optimizer = distopt.SGD(laid.named(), lr=0.1)
        checkpoint.load(path / "native", model=model, optimizer=optimizer, averages={kind: average})
    else:
        state = {"average": average.state_dict()}
        dcp.load(state, checkpoint_id=path / "torch")
        average.load_state_dict(state["average"])
    for step in range(6, 10):
        for name, param in laid.params.items():
            local_tensor(param).detach().copy_(laid.local(name, weights(step)[name]))
        average.update()
    with average.swapped():
        return [
            name
            for name, param in laid.params.items()
            if not torch.allclose(
                local_tensor(param).double(), laid.local(name, expected(kind, 9, name)), rtol=1e-6, atol=1e-6
            )
        ]


@pytest.mark.parametrize("kind", MAKE)
def test_both_checkpoints_carry_averages_to_other_layouts_and_ranks(kind: str, tmp_path: Path) -> None:
    pool(4).run(f"{HERE}:saved", kind, "fsdp", tmp_path)
    for source in ("native", "torch"):
        assert pool(4).run(f"{HERE}:loaded", kind, "fsdp", tmp_path, source) == [[]] * 4
        assert pool(2).run(f"{HERE}:loaded", kind, "columns", tmp_path, source) == [[]] * 2
    assert pool(2).run(f"{HERE}:loaded", kind, "flat", tmp_path, "native") == [[]] * 2


def test_flat_shards_under_torchs_checkpoint_load_on_the_same_cuts_only(tmp_path: Path) -> None:
    pool(4).run(f"{HERE}:saved", "ema", "flat", tmp_path)
    assert pool(4).run(f"{HERE}:loaded", "ema", "flat", tmp_path, "torch") == [[]] * 4
    with pytest.raises(RankError, match="Missing key in checkpoint"):
        pool(2).run(f"{HERE}:loaded", "ema", "flat", tmp_path, "torch")


def evaluated() -> list[Tensor]:
    """Outputs with the weights, their average and the weights again, in three rounds of which each halves the weights
    after the average has become them. FSDP2 leaves the root's gathered weights behind a forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    fully_shard(model)
    average = EMA(model, decay=0.0)
    outputs = []
    with torch.no_grad():
        for _ in range(3):
            average.update()
            for param in model.parameters():
                local_tensor(param).mul_(0.5)
            outputs.append(model(x))
            with average.swapped():
                outputs.append(model(x))
            outputs.append(model(x))
    return outputs


def test_evaluation_under_fsdp2_sees_the_average_and_training_does_not() -> None:
    for first, _, again, second, average, *_ in pool(2).run(f"{HERE}:evaluated"):
        assert torch.equal(first, again)
        assert torch.equal(average, first)
        assert not torch.equal(second, first)
