"""The Transformers Trainer: names and settings, states divided over replicas, refusals. How it trains is in
`test_trainers.py`."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.pool import RankError, pool

transformers = pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate")

from transformers import HfArgumentParser, Trainer, TrainingArguments  # noqa: E402
from transformers.integrations import deepspeed as hf_deepspeed  # noqa: E402
from transformers.training_args import OptimizerNames  # noqa: E402

import distopt.integrations.transformers as integration  # noqa: E402
from distopt.rules import RULES  # noqa: E402
from tests.integrations.training import LR, Full, equal, full_weights, furthest, model, moved, sequences, train, trainer  # noqa: E402

TRAIN = "tests.integrations.training:train"


@pytest.fixture(autouse=True)
def _registered() -> None:
    integration.register()


@pytest.fixture(autouse=True)
def _no_environment_stays(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = dict(os.environ)
    yield
    for key in os.environ.keys() - before.keys():
        del os.environ[key]


# ---- by name and by argument


def test_both_routes_make_the_same_optimizer(tmp_path: Path) -> None:
    options = {"lr": LR, "weight_decay": 0.1, "momentum": 0.9, "rest": "lion", "rest_options": {"betas": (0.8, 0.99)}}
    official = train("one", tmp_path, optimizer=("muon", options), steps=3)
    by_name = train(
        "one", tmp_path, optim="distopt_muon", optim_args="momentum=0.9, rest=lion, rest.beta1=0.8", steps=3
    )
    assert equal(official, by_name)
    assert not equal(official, train("one", tmp_path, optim="distopt_muon", steps=3))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_by_its_name(name: str, tmp_path: Path) -> None:
    trained = train("one", tmp_path, optim=f"distopt_{name}", steps=3)
    assert all(weight.isfinite().all() for weight in trained.values())
    start = full_weights(model())
    assert any(not torch.equal(trained[key], start[key]) for key in start)


def test_names_with_8bit_keep_their_states_in_int8(tmp_path: Path) -> None:
    made = trainer("one", tmp_path, optim="distopt_adamw_8bit")
    assert {group["state_codec"] for group in made.create_optimizer().param_groups} == {"int8"}
    eight = train("one", tmp_path, optim="distopt_adamw_8bit")
    assert moved(eight)
    assert 0 < furthest(train("one", tmp_path, optim="distopt_adamw"), eight) < 0.05


# ---- states divided over replicas


def divided(directory: Path, **options: Any) -> Full:
    optimizer = ("muon", {"lr": LR, "partition": options.pop("partition", True)})
    callbacks = (integration.NativeCheckpoint(),) if options.pop("callback", True) else ()
    settings = {"steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
    return pool(2).run(TRAIN, "ddp", str(directory), optimizer=optimizer, callbacks=callbacks, **settings)[0]


def test_divided_states_resume_from_the_native_checkpoint(tmp_path: Path) -> None:
    through = divided(tmp_path)
    assert equal(through, divided(tmp_path, partition=False, save_strategy="no"))
    assert not torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    checkpoint = str(tmp_path / "checkpoint-3")
    assert equal(through, divided(tmp_path, resume=checkpoint))
    with pytest.raises(RankError, match="add the callback NativeCheckpoint"):
        divided(tmp_path, resume=checkpoint, callback=False)
    with pytest.raises(RankError, match="saved with partition=True"):
        divided(tmp_path, resume=checkpoint, partition=False)


def test_divided_states_without_the_callback_are_not_saved_by_halves(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="NativeCheckpoint"):
        divided(tmp_path, callback=False)


# ---- settings


def groups(**settings: Any) -> list[dict[str, Any]]:
    made = trainer("one", "unused", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return made.create_optimizer().param_groups


def test_settings_of_adam_reach_the_rules_that_have_them() -> None:
    matrices, rest = groups(optim="distopt_soap", adam_beta1=0.8, adam_epsilon=1e-6)[:2]
    assert (matrices["rule"], matrices["betas"], matrices["eps"]) == ("soap", (0.8, 0.95), 1e-6)
    assert (rest["rule"], rest["betas"], rest["eps"]) == ("adamw", (0.8, 0.999), 1e-6)
    assert (matrices["lr"], rest["weight_decay"]) == (LR, 0.1)
    matrices, rest = groups(optim="distopt_muon", adam_epsilon=1e-6)[:2]
    assert (matrices["eps"], rest["eps"]) == (1e-7, 1e-6), "Muon's eps is another number"


def test_a_rule_keeps_its_own_defaults() -> None:
    [decayed, _] = groups(optim="distopt_lion", learning_rate=3e-4)
    assert (decayed["lr"], decayed["betas"]) == (3e-4, (0.9, 0.99))


def test_settings_that_no_rule_has_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"adam_beta2=0.9 is ignored: distopt_adafactor"):
        trainer("one", "unused", optim="distopt_adafactor", adam_beta2=0.9).create_optimizer()


@pytest.mark.parametrize("optim", [{"optim": "distopt_amos"}, {"optim": "distopt_muon", "optim_args": "rest=amos"}])
def test_a_rule_without_weight_decay_says_that_it_ignores_it(optim: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"weight_decay=0.1 is ignored by amos"):
        trainer("one", "unused", **optim).create_optimizer()


def test_optim_args_are_typed() -> None:
    options = (
        "momentum=0.9,nesterov=false,ns_steps=6,ns=polar_express,ns_dtype=bfloat16,adjust_lr_fn=none,rest.beta2=0.95"
    )
    matrices, rest = groups(optim="distopt_muon", optim_args=options)[:2]
    assert matrices["momentum"] == 0.9 and matrices["nesterov"] is False and matrices["ns_steps"] == 6
    assert (
        matrices["ns_dtype"] is torch.bfloat16
        and matrices["adjust_lr_fn"] is None
        and matrices["ns"] == "polar_express"
    )
    assert rest["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "distopt_muno"}, "did you mean 'distopt_muon'"),
        ({"optim": "distopt-adamw"}, "did you mean 'distopt_adamw'"),
        ({"optim": "nothing_like_it"}, "not a valid OptimizerNames"),
        ({"optim": "distopt_muon", "optim_args": "momentun=0.9"}, "no option 'momentun'; did you mean 'momentum'"),
        ({"optim": "distopt_muon", "optim_args": "rest.beta=0.9"}, "no option 'beta'; did you mean 'betas'"),
        ({"optim": "distopt_muon", "optim_args": "momentum=much"}, "momentum='much' of muon: expected a float"),
        ({"optim": "distopt_muon", "optim_args": "nesterov=1"}, "nesterov=1 of muon: expected a bool"),
        ({"optim": "distopt_muon", "optim_args": "lr=0.1"}, "lr is TrainingArguments' learning_rate"),
        ({"optim": "distopt_muon", "optim_args": "rest=adamww"}, "did you mean 'adamw'"),
        ({"optim": "distopt_adamw", "optim_args": "rest=lion"}, "'rest' has no meaning for adamw"),
        ({"optim": "distopt_adamw", "optim_target_modules": ["mlp"]}, "optim_target_modules.*no meaning for adamw"),
        ({"optim": "distopt_muon", "optim_target_modules": ["mpl"]}, "optim_target_modules.*chooses none.*q_proj"),
    ],
)
def test_what_a_user_got_wrong_is_said_before_training(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trainer("one", "unused", **settings).create_optimizer()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["mlp"], {"gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "k_proj"], {"q_proj", "k_proj"}),
        (r".*layers\.0.*(q|o)_proj", {"q_proj", "o_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_target_modules_choose_the_matrices(chosen: Any, expected: set[str]) -> None:
    made = trainer("one", "unused", optim="distopt_muon", optim_target_modules=chosen, tied=False)
    routing = made.create_optimizer().routing
    assert {name.split(".")[-2] for name, rule, _ in routing if rule == "muon"} == expected
    assert {rule for name, rule, _ in routing if "embed" in name or "lm_head" in name} == {"adamw"}


# ---- roles


def models() -> list[nn.Module]:
    small: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    bert = transformers.BertConfig(hidden_size=16, intermediate_size=24, **small)
    qwen = transformers.Qwen3Config(hidden_size=16, intermediate_size=24, head_dim=8, num_key_value_heads=2, **small)
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return [
        model(tied=True),
        model(tied=False),
        transformers.GPT2LMHeadModel(gpt2),
        transformers.BertForMaskedLM(bert),
        transformers.Qwen3ForCausalLM(qwen),
        transformers.T5ForConditionalGeneration(t5),
    ]


@pytest.mark.parametrize("number", range(6), ids=["llama-tied", "llama", "gpt2", "bert", "qwen3", "t5"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_parameters_that_decay_are_those_of_the_trainer(name: str, number: int) -> None:
    """Each parameter once, tied ones too."""
    built = models()[number]
    cls, options = integration.optimizer(name, lr=LR, weight_decay=0.1)
    found: dict[str, float] = {}
    for group in cls()(built, **options).param_groups:
        for key in group["param_names"]:
            assert key not in found
            found[key] = group["weight_decay"]
    assert found.keys() == dict(built.named_parameters()).keys()
    theirs = Trainer.get_decay_parameter_names(None, built)  # type: ignore[arg-type]
    assert {key for key, decay in found.items() if decay} == set(theirs) & found.keys()


def test_tied_embeddings_are_embeddings() -> None:
    routing = {
        name: rule for name, rule, _ in trainer("one", "unused", optim="distopt_muon").create_optimizer().routing
    }
    assert routing["model.embed_tokens.weight"] == "adamw" and "lm_head.weight" not in routing


# ---- names


def test_names_work_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    parser = HfArgumentParser(TrainingArguments)
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": "unused", "use_cpu": True, "optim": "distopt_soap"}))
    (tmp_path / "args.yaml").write_text("output_dir: unused\nuse_cpu: true\noptim: distopt_soap\n")
    parsed = [
        *parser.parse_args_into_dataclasses(["--output_dir", "unused", "--use_cpu", "--optim", "distopt_soap"]),
        *parser.parse_json_file(str(tmp_path / "args.json")),
        *parser.parse_yaml_file(str(tmp_path / "args.yaml")),
    ]
    for args in parsed:
        assert args.optim is OptimizerNames("distopt_soap") is OptimizerNames.DISTOPT_SOAP  # type: ignore[attr-defined]
        assert pickle.loads(pickle.dumps(args)).optim is args.optim
        assert json.loads(args.to_json_string())["optim"] == "distopt_soap"


def test_registering_twice_changes_nothing() -> None:
    before = list(OptimizerNames)
    integration.register()
    assert list(OptimizerNames) == before
    assert {f"distopt_{name}{end}" for name in RULES for end in ("", "_8bit")} <= {member.value for member in before}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)


def test_nothing_is_registered_unless_asked_for() -> None:
    done = run_python(
        "import distopt, distopt.integrations.transformers\n"
        "from transformers.training_args import OptimizerNames\n"
        "print([name.value for name in OptimizerNames if name.value.startswith('distopt')])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_trainer_names_what_to_install() -> None:
    done = run_python(
        "import sys; sys.modules['transformers'] = None\nimport distopt\ndistopt.integrations.transformers.register()"
    )
    assert "ImportError: distopt.integrations.transformers needs transformers >= 5.2" in done.stderr
    assert "pip install 'distopt[transformers]'" in done.stderr


# ---- what cannot go together


class Config:
    """What transformers keeps of a DeepSpeed config, without DeepSpeed."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config


def test_an_optimizer_in_the_deepspeed_config_too_is_refused() -> None:
    config = Config({"optimizer": {"type": "AdamW"}})
    hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        with pytest.raises(ValueError, match=r"both the Trainer \(muon\) and the DeepSpeed config \(AdamW\)"):
            integration.optimizer("muon", lr=LR)
        with pytest.raises(ValueError, match=r"both the Trainer \(distopt_muon\) and the DeepSpeed config"):
            trainer("one", "unused", optim="distopt_muon")
        trainer("one", "unused", optim="adamw_torch")
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()


def test_an_optimizer_that_was_chosen_before_the_deepspeed_config_is_refused_too() -> None:
    chosen: Any = integration.optimizer("muon", lr=LR)
    config = Config({"optimizer": {"type": "AdamW"}})
    hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        with pytest.raises(ValueError, match=r"both the Trainer \(muon\) and the DeepSpeed config \(AdamW\)"):
            Trainer(model(), TrainingArguments(use_cpu=True, report_to=[]), optimizer_cls_and_kwargs=chosen)
        del chosen
        trainer("one", "unused", optim="adamw_torch")
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()


def test_states_that_zero_divides_are_not_divided_again() -> None:
    config = Config({"zero_optimization": {"stage": 1}})
    hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        cls, options = integration.optimizer("muon", lr=LR, partition=True)
        with pytest.raises(ValueError, match="partition=True is for DDP; ZeRO stage 1 divides states"):
            cls()(model(), **options)
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()


def wrapped_by_fsdp1(name: str) -> str:
    """Run by ranks."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    cls, options = integration.optimizer(name, lr=LR)
    with pytest.raises(ValueError, match="FSDP1") as caught:
        cls()(wrapped, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fsdp1_is_refused_and_never_trained_as_something_else(name: str) -> None:
    for message in pool(2).run("tests.integrations.test_transformers:wrapped_by_fsdp1", name):
        assert "fsdp_config={'version': 2}" in message


def test_the_callback_does_nothing_where_states_are_whole(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "distopt_adamw", "steps": 2, "save_strategy": "steps", "save_steps": 1}
    train("one", tmp_path, callbacks=(integration.NativeCheckpoint(),), **options)
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").is_file()
    assert not (tmp_path / "checkpoint-1" / integration.NATIVE).exists()


def test_data_of_the_tests_differ_between_steps() -> None:
    tokens: list[Tensor] = [row["input_ids"] for row in sequences(24)]
    assert len({tuple(row.tolist()) for row in tokens}) == 24
