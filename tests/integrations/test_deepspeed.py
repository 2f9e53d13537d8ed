"""Rules of this package through `deepspeed.initialize`: ZeRO 0 to 3 against one process, resume, and what is refused.

Ranks run in pools of their own: DeepSpeed replaces functions of torch (its stage 3 `linear`) for the life of a process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distopt.integrations.deepspeed import ClientOptimizer, check_config, from_config, optimizer
from tests.distributed.pool import Pool, pool

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install distopt[deepspeed]"
)
ROOT = Path(__file__).parents[2]
RANKS = "tests.integrations.deepspeed_ranks"
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
STAGES: dict[str, dict[str, Any]] = {f"stage {stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)}


def ranks(size: int) -> Pool:
    return pool(size, "deepspeed")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("name", "limit"), [("adamw", 1e-5), ("adafactor", 1e-5), ("muon", 1e-4)])
def test_every_stage_equals_one_process(name: str, limit: float, size: int) -> None:
    found = ranks(size).run(f"{RANKS}:distances", name, OPTIONS, STAGES)
    torchs = ranks(size).run(f"{RANKS}:distances", "torch", OPTIONS, STAGES)
    print(name, size, found[0], "torch.optim.AdamW", torchs[0])
    for ours, theirs in zip(found, torchs):
        assert all(distance <= limit for distance in ours.values()), ours
        # What DeepSpeed itself adds, by reducing gradients in another order, is what torch's AdamW shows; one rounding of a
        # weight apart, as it steps a whole partition at once, whose elements the fused kernel groups otherwise.
        assert name == "muon" or all(ours[stage] <= theirs[stage] + 2.0**-24 for stage in STAGES), (ours, theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [("adamw", {}), ("adamw", {"state_codec": "int8"}), ("muon", {}), ("soap", {})],
    ids=["adamw", "adamw int8", "muon", "soap"],
)
def test_the_same_batch_on_two_ranks_gives_the_same_bits(name: str, options: dict[str, Any]) -> None:
    for wrong in ranks(2).run(f"{RANKS}:unequal", name, {**OPTIONS, **options}, STAGES):
        assert wrong == {key: [] for key in STAGES}


SETTINGS: dict[str, dict[str, Any]] = {
    "zero.Init": {"zero_init": True, "zero_optimization": {"stage": 3}},
    "small sub-groups": {"zero_optimization": {"stage": 3, "sub_group_size": 700}},
    "every parameter partitioned": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "round robin, stage 1": {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
    "offloaded, stage 1": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "offloaded, stage 2": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "offloaded, stage 3": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    "parameters offloaded too": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    },
    "all-reduced gradients": {"zero_optimization": {"stage": 2, "reduce_scatter": False, "overlap_comm": False}},
    "small buckets": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500, "contiguous_gradients": False}},
}


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_settings_of_deepspeed_change_nothing(name: str) -> None:
    for found in ranks(2).run(f"{RANKS}:distances", name, OPTIONS, SETTINGS):
        assert all(distance <= 1e-5 for distance in found.values()), found


def test_accumulating_one_sequence_twelve_times_equals_twelve_at_once() -> None:
    configs = {label: {**config, "gradient_accumulation_steps": 12} for label, config in STAGES.items()}
    for found in ranks(2).run(f"{RANKS}:distances", "muon", OPTIONS, configs):
        assert all(distance <= 1e-5 for distance in found.values()), found


def test_clipping_is_of_the_gradient_not_of_the_update() -> None:
    clip = 0.02
    configs = {label: {**config, "gradient_clipping": clip} for label, config in STAGES.items()}
    for found in ranks(2).run(f"{RANKS}:distances", "muon", OPTIONS, configs, clip=clip):
        assert all(distance <= 1e-5 for distance in found.values()), found
    for found in ranks(2).run(f"{RANKS}:distances", "muon", OPTIONS, configs):
        assert all(distance > 1e-4 for distance in found.values()), "the norms of this model are clipped"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bf16_steps_fp32_copies_on_every_stage(name: str) -> None:
    bf16 = {"bf16": {"enabled": True}}
    accumulated = {"data_types": {"grad_accum_dtype": "fp32"}}
    configs = {label: {**config, **bf16} for label, config in STAGES.items()}
    configs |= {f"{label}, fp32 sums": {**configs[label], **accumulated} for label in list(STAGES)[1:]}
    for wrong in ranks(2).run(f"{RANKS}:unequal", name, OPTIONS, configs, dtype=torch.bfloat16):
        assert wrong == {key: [] for key in configs}, "stage 0 has no step before the first"


def test_fp16_is_unscaled_before_the_rule() -> None:
    scale = 65536
    configs = {label: {**STAGES[label], "fp16": {"enabled": True, "loss_scale": scale}} for label in list(STAGES)[1:]}
    for wrong in ranks(2).run(f"{RANKS}:unequal", "muon", OPTIONS, configs, dtype=torch.float16, scale=scale):
        assert wrong == {key: [] for key in configs}


def test_steps_that_fp16_skips_do_not_count() -> None:
    for skipped, ages in ranks(2).run(f"{RANKS}:overflow", "adamw", OPTIONS):
        assert 0 < skipped < 12
        assert ages == {12 - skipped}


@pytest.mark.parametrize("name", ["muon", "soap", "adafactor"])
def test_resume_is_bit_for_bit(name: str, tmp_path: Path) -> None:
    configs = {
        **STAGES,
        "small sub-groups": SETTINGS["small sub-groups"],
        "offloaded": SETTINGS["offloaded, stage 2"],
        "bf16": {**STAGES["stage 0"], "bf16": {"enabled": True}},
        "bf16, fp32 sums": {
            **STAGES["stage 1"],
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
    }
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 8}}}
    configs = {label: {**config, **scheduler} for label, config in configs.items()}
    for wrong in ranks(2).run(f"{RANKS}:resumed_differently", name, OPTIONS, configs, str(tmp_path)):
        assert wrong == {key: [] for key in configs}


def test_a_config_names_the_optimizer(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 12,
        "optimizer": {"type": "distopt_muon", "params": OPTIONS},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    for distance in ranks(2).run(f"{RANKS}:from_file", str(path), OPTIONS):
        assert distance <= 1e-5


@pytest.mark.parametrize(
    ("how", "stage", "said"),
    [
        ("weights loaded behind its back", 1, "refresh_fp32_params"),
        ("weights loaded behind its back", 3, "refresh_fp32_params"),
        ("an ordinary optimizer", 2, "distopt.integrations.deepspeed.optimizer"),
        ("a checkpoint of another optimizer", 2, "another optimizer than distopt's"),
        ("other sub-groups", 3, "sub_group_size"),
        ("a group in pieces whose rule keeps one state for all of it", 3, "raise zero_optimization.sub_group_size"),
    ],
)
def test_what_would_train_a_wrong_model_is_an_error_on_every_rank(
    how: str, stage: int, said: str, tmp_path: Path
) -> None:
    for complaint in ranks(2).run(f"{RANKS}:complaint", how, stage, str(tmp_path)):
        assert said in complaint


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(7, 4), nn.Linear(4, 6)


def test_no_name_that_deepspeed_treats_as_its_own() -> None:
    made = optimizer("muon", Block(), lr=0.1)
    assert "muon" not in type(made).__name__.lower()
    assert {name: rule for name, rule, _ in made.routing} == {
        "embed.weight": "adamw", "up.weight": "muon", "up.bias": "adamw",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_grad_norm": 1.0}, "gradient_clipping"),
        ({"process_group": None}, "ZeRO stage 1"),
        ({"missing_grad": "raise"}, "zeros"),
        ({"momentun": 0.9}, "did you mean 'momentum'"),
        ({"config": {"optimizer": {"type": "AdamW"}}}, "sets up an optimizer too"),
        (
            {"config": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}},
            "offload_optimizer.device: 'cpu' or 'none'",
        ),
        (
            {"config": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}},
            "offload_param.device: 'cpu'",
        ),
        ({"config": {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}}, "offload_optimizer.ratio"),
        ({"config": {"zero_optimization": {"zero_hpz_partition_size": 2}}}, "zero_hpz_partition_size"),
        ({"config": {"zero_optimization": {"stag": 2}}}, "did you mean 'stage'"),
        ({"config": {"amp": {"enabled": True}}}, "amp"),
        ({"config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, "zero_force_ds_cpu_optimizer"),
        ({"config": {"zero_optimization": {"stage": 0}, "fp16": {"enabled": True}}}, "stage 0"),
    ],
)
def test_bad_options_are_refused_when_the_optimizer_is_built(options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        optimizer("muon", Block(), lr=0.1, **options)


@pytest.mark.parametrize(("name", "said"), [("muon_clip", "wants more than steps"), ("lbfgs", "no rule is called")])
def test_what_needs_more_than_steps_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        optimizer(name, Block(), lr=0.1)


def test_options_that_are_written_down_and_switched_off_are_none() -> None:
    """As trainers fill them in."""
    zero = {"stage": 2, "offload_param": {"device": "none", "nvme_path": None}, "zero_quantized_weights": False}
    check_config(
        {
            "zero_optimization": zero,
            "fp16": {"enabled": False},
            "amp": {"enabled": False},
            "communication_data_type": None,
        }
    )


def test_no_matrix_for_the_matrix_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter of this Embedding is for muon"):
        optimizer("muon", nn.Embedding(7, 4), lr=0.1)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (None, "distopt_<rule>"),
        ({"type": "AdamW", "params": {"lr": 0.1}}, "distopt_<rule>"),
        ({"type": "distopt_muonn", "params": {"lr": 0.1}}, "did you mean 'muon'"),
        ({"type": "distopt_muon", "params": {"lr": "auto"}}, "optimizer.params.lr is 'auto'"),
    ],
)
def test_a_config_that_does_not_name_an_optimizer_of_ours_is_refused(section: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_config({"optimizer": section} if section else {}, Block())


def test_from_config_leaves_what_deepspeed_wants_to_see() -> None:
    given = {
        "optimizer": {"type": "Distopt_AdamW", "params": {"lr": 0.1, "betas": [0.8, 0.9]}},
        "zero_optimization": {},
    }
    made, config = from_config(given, Block())
    assert isinstance(made, ClientOptimizer)
    assert made.param_groups[0]["betas"] == (0.8, 0.9)
    assert "optimizer" in given and "optimizer" not in config
    assert config["zero_allow_untested_optimizer"] is True
    check_config(config)


def launch(folder: Path, *arguments: str) -> str:
    """The output of launch/train_deepspeed.py on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "launch/train_deepspeed.py",
        "--config",
        "configs/deepspeed_tiny.yaml",
        "--dir",
        str(folder),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_script_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    launch(tmp_path, "--steps", "30")
    output = launch(tmp_path)
    assert "steps 30 to 60" in output
    assert "muon for 28 of 39 parameters" in output
    (loss,) = [float(line.split()[-2]) for line in output.splitlines() if "validation loss" in line]
    assert loss < 2.9, "a byte at random costs ln 256 = 5.5; the frequencies of bytes alone 3.3"


def test_the_script_runs_stage_3_in_bf16_with_offloaded_states(tmp_path: Path) -> None:
    small = ["--model.hidden_size", "32", "--model.intermediate_size", "48", "--model.num_hidden_layers", "1"]
    output = launch(tmp_path, "--deepspeed", "configs/deepspeed_zero3.json", "--steps", "3", *small)
    assert "stage 3, torch.bfloat16" in output
