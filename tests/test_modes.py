"""Rules with two sets of weights: the ones that are trained and the ones to evaluate, to save and to go on from."""

import copy
import pickle

import pytest
import schedulefree
import torch
from torch import Tensor, nn

import distopt
from distopt.rules import RULES, rule_class

MODES = [name for name in RULES if rule_class(name).modes]
LR = {"schedule_free_sgd": 0.1, "schedule_free_adamw": 0.01, "schedule_free_prodigy": 1.0}


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("name", "theirs"), [("sgd", "SGDScheduleFree"), ("adamw", "AdamWScheduleFree")])
def test_both_sets_of_weights_are_those_of_schedulefree(name: str, theirs: str) -> None:
    ours, other = model_of(), model_of()
    mine = distopt.create_optimizer(f"schedule_free_{name}", ours, lr=0.05, weight_decay=0.0, warmup_steps=3)
    public = getattr(schedulefree, theirs)(other.parameters(), lr=0.05, warmup_steps=3)
    for steps in (range(5), range(5, 9)):
        public.train()
        mine.train()
        train(ours, mine, steps)
        train(other, public, steps)
        mine.eval()
        public.eval()
        torch.testing.assert_close(weights(ours), weights(other), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", MODES)
def test_evaluation_weights_differ_and_training_goes_on_as_if_nobody_had_looked(name: str) -> None:
    looked, undisturbed = model_of(), model_of()
    first, second = (distopt.create_optimizer(name, m, lr=LR[name]) for m in (looked, undisturbed))
    train(looked, first, range(6))
    trained = weights(looked)
    first.eval()
    first.eval()
    assert any(not torch.equal(a, b) for a, b in zip(trained, weights(looked)))
    first.train()
    torch.testing.assert_close(weights(looked), trained, rtol=1e-5, atol=1e-6)
    train(looked, first, range(6, 9))
    train(undisturbed, second, range(9))
    torch.testing.assert_close(weights(looked), weights(undisturbed), rtol=1e-4, atol=1e-5)


def test_coded_states_keep_both_sets_of_weights_exact() -> None:
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    found = []
    for codec in ("fp32", "int8"):
        param = nn.Parameter(weight.clone())
        optimizer = distopt.ScheduleFreeAdamW([("w", param)], lr=0.01, state_codec=codec)
        for _ in range(3):
            param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.eval()
        found.append(param.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)
    assert not torch.equal(found[0], weight)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_checkpoint_in_either_mode_continues_bit_for_bit(name: str, mode: str) -> None:
    model = model_of()
    optimizer = distopt.create_optimizer(name, model, lr=LR[name])
    train(model, optimizer, range(5))
    getattr(optimizer, mode)()
    again = model_of(seed=1)
    resumed = distopt.create_optimizer(name, again, lr=LR[name])
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for m, o in ((model, optimizer), (again, resumed)):
        o.train()
        train(m, o, range(5, 8))
        o.eval()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(again)))


@pytest.mark.parametrize("name", MODES)
def test_the_wrong_mode_is_an_error_that_says_what_to_call(name: str) -> None:
    model = model_of()
    optimizer = distopt.create_optimizer(name, model, lr=LR[name])
    train(model, optimizer, range(2))
    model.eval()
    with pytest.raises(ValueError, match=r"call optimizer\.eval\(\) before"):
        model(torch.zeros(1, 5))
    optimizer.eval()
    model(torch.zeros(1, 5))
    pickle.loads(pickle.dumps(model))(torch.zeros(1, 5))
    model.train()
    with pytest.raises(ValueError, match=r"call optimizer\.train\(\) before"):
        train(model, optimizer, range(2, 3))


def test_rules_with_one_set_of_weights_have_no_modes() -> None:
    model = model_of()
    optimizer = distopt.create_optimizer("adamw", model, lr=0.1)
    train(model, optimizer, range(2))
    before = weights(model)
    optimizer.eval()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)))
    train(model, optimizer, range(2, 3))


def test_prodigy_has_one_d_for_all_groups() -> None:
    """Groups of create_optimizer differ in weight decay alone; prodigyopt's d is over all of them as well."""
    from prodigyopt import Prodigy

    model, other = model_of(), model_of()
    optimizer = distopt.create_optimizer("prodigy", model, lr=1.0, weight_decay=0.1, d0=1e-3)
    decayed = [p for p in other.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in other.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    public = Prodigy(groups, lr=1.0, weight_decay=0.1, d0=1e-3)
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, range(8))
    train(other, public, range(8))
    found = {state["d"].item() for state in optimizer.state.values()}
    assert len(found) == 1
    # d grows from a difference of weights that are nearly the same: rounding of 7e-5 in the second step, 4e-3 by now.
    assert found.pop() == pytest.approx(float(public.param_groups[0]["d"]), rel=1e-2)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-2, atol=1e-2)
