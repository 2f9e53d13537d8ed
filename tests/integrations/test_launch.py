"""The scripts of launch/ that users of a trainer or of several machines copy, run as they are."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.pool import DEADLINE

pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]
SMALL = ["--max_steps", "2", "--hidden_size", "32", "--intermediate_size", "48", "--seq_len", "32", "--save_steps", "2"]
SMALL += ["--num_hidden_layers", "1", "--eval_sequences", "4", "--disable_tqdm", "true"]


def environment(**more: str) -> dict[str, str]:
    """Scripts find this Python first, whatever environment is active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    done = [*map(str, command)]
    return subprocess.run(
        done, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=2 * DEADLINE, check=False
    )


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_train_hf_trains_on_two_machines_and_resumes(tmp_path: Path) -> None:
    """Two machines are two calls of the script on this one."""
    command = ["bash", "launch/multinode.sh", "launch/train_hf.py", "--config", "configs/train_hf.yaml", *SMALL]
    command += ["--output_dir", str(tmp_path / "run"), "--optim", "distopt_soap"]
    more = {"HEAD": "127.0.0.1", "NODES": "2", "PROCESSES": "1", "PORT": free_port()}
    nodes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=2 * DEADLINE)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert sum("after 2 steps with distopt_soap" in text for text in said) == 1
    assert (tmp_path / "run" / "checkpoint-2" / "rng_state_1.pth").is_file()
    command = [sys.executable, *command[2:], "--max_steps", "3", "--resume_from_checkpoint", "auto"]
    done = run(*command)
    assert "after 3 steps with distopt_soap" in done.stdout, done.stderr


def on_two_ranks(*command: str, **more: str) -> str:
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_train_hf_trains_through_deepspeed_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", minversion="0.19.8")
    command = ["launch/train_hf.py", "--config", "configs/train_hf.yaml", *SMALL, "--output_dir", str(tmp_path)]
    command += ["--deepspeed", "configs/train_hf_zero2.json"]
    assert "after 2 steps with distopt_muon" in on_two_ranks(*command)
    assert [*tmp_path.glob("checkpoint-2/global_step2/*optim_states.pt")]
    resumed = on_two_ranks(*command, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    assert "after 3 steps with distopt_muon" in resumed


def test_train_accelerate_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    command = ["launch/train_accelerate.py", "--config", "configs/accelerate_tiny.yaml", "--dir", str(tmp_path / "run")]
    first = on_two_ranks(*command, "--steps", "20", "--accumulate", "2")
    assert "after steps 0 to 20 with muon on 2 ranks" in first
    said = on_two_ranks(*command, "--steps", "30")
    assert "after steps 20 to 30 with muon on 2 ranks" in said
    losses = [float(text.split("validation loss ")[1].split()[0]) for text in (first, said)]
    assert losses[1] < losses[0] < 3.6, "a byte at random costs ln 256 = 5.5"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_hf", "train_deepspeed", "train_accelerate"])
def test_a_script_ends_within_three_minutes_as_it_is_configured(script: str, tmp_path: Path) -> None:
    """`run` has a deadline. On two cores with nothing else on them."""
    config = {"train_hf": "train_hf", "train_deepspeed": "deepspeed_tiny", "train_accelerate": "accelerate_tiny"}[
        script
    ]
    folder = ["--output_dir" if script == "train_hf" else "--dir", str(tmp_path / "run")]
    begin = time.monotonic()
    said = on_two_ranks(f"launch/{script}.py", "--config", f"configs/{config}.yaml", *folder)
    print(f"{script}: {time.monotonic() - begin:.0f} s")
    assert time.monotonic() - begin < 180
    assert "validation loss" in said


@pytest.mark.parametrize(("script", "missing"), [("train_deepspeed", "deepspeed"), ("train_accelerate", "accelerate")])
def test_a_script_names_the_package_that_is_missing(script: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / f"{missing}.py").write_text("raise ImportError('it is not installed')\n")
    done = run(sys.executable, f"launch/{script}.py", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode != 0
    assert f"pip install 'distopt[{missing}]'" in done.stderr or f"pip install distopt[{missing}]" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optin: distopt_muon\n", "line 1: 'optin' is not an option; did you mean 'optim'?"),
        ("optim: distopt_muno\n", "did you mean 'distopt_muon'"),
        ("max_steps: 1\nmax_steps: 2\n", "line 2: 'max_steps' is given twice"),
    ],
)
def test_train_hf_says_what_is_wrong_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    done = run(sys.executable, "launch/train_hf.py", "--config", str(tmp_path / "wrong.yaml"))
    assert done.returncode != 0
    assert message in done.stderr


def test_slurm_starts_one_call_per_node_with_the_head_and_a_port(tmp_path: Path) -> None:
    """With an srun that runs its command once, an scontrol that lists two nodes, and a torchrun that says its arguments."""
    programs = {
        "scontrol": 'echo "node-7"; echo "node-8"',
        "srun": 'echo "srun $1"; shift; exec "$@"',
        "torchrun": 'echo "torchrun $*"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launch").mkdir()  # no .venv beside it, which would bring its own torchrun
    shutil.copy(ROOT / "launch" / "multinode.sh", tmp_path / "launch")
    slurm = {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12345", "PROCESSES": "8"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run(
        *("bash", "launch/slurm.sbatch", "launch/train_hf.py", "--max_steps", "3"),
        **slurm,
        PATH=path,
        SLURM_SUBMIT_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1",
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node-7:22345 --rdzv-id 12345 "
        "launch/train_hf.py --max_steps 3",
    ]


@pytest.mark.parametrize("missing", ["HEAD", "NODES"])
def test_multinode_says_what_is_missing(missing: str) -> None:
    more = {name: "1" for name in ("HEAD", "NODES") if name != missing}
    done = run("bash", "launch/multinode.sh", "launch/train_hf.py", **more)
    assert done.returncode != 0
    assert f"{missing}: set it to" in done.stderr
