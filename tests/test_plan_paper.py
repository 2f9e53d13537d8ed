"""Plans on paper: every rank's loads from one plan, and the command line around them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distopt
from benchmarks.shapes import Shapes, hidden_matrices, llama3_8b
from distopt.cli import main
from distopt.cli.plan import model_of_shapes, plan_model, read_model, read_options
from distopt.layouts import Layout, Plain, Sharded
from distopt.plan.buckets import Group, Spec
from distopt.plan.build import plan_group
from distopt.plan.cost import CPU, H100
from distopt.plan.paper import Mesh, loads_of, tensor_parallel_dim, total
from distopt.plan.report import PlanReport
from distopt.rule import Rule
from distopt.rules.adafactor import Adafactor
from distopt.rules.adamw import AdamW
from distopt.rules.muon import Muon
from distopt.rules.soap import SOAP

SHAPES: Shapes = {
    "layers.0.q_proj.weight": (24, 16), "layers.0.k_proj.weight": (9, 16), "layers.0.o_proj.weight": (16, 24),
    "layers.0.up_proj.weight": (41, 16), "layers.0.down_proj.weight": (16, 41), "layers.0.norm.weight": (16,),
    "layers.0.experts": (3, 16, 8), "layers.0.gate": (1, 16),
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "vocab_size": 101,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def layout_on(mesh: Mesh, rank: int, layout: Layout) -> Layout:
    """The same layout in the copy that `rank` belongs to."""
    where = mesh.positions(layout.ranks)
    own = np.flatnonzero([np.array_equal(c, True) for c in _same_copy(mesh, rank, layout)])
    assert len(own) == len(layout.ranks) == where.max() + 1
    return replace(layout, ranks=tuple(own.tolist()))


def _same_copy(mesh: Mesh, rank: int, layout: Layout) -> Any:
    spanned = mesh.coordinates[:, list(layout.ranks)].any(1)
    return ((mesh.coordinates == mesh.coordinates[:, [rank]]) | spanned[:, None]).all(0)


@pytest.mark.parametrize(
    "rule", [AdamW(), Adafactor(), Muon(), SOAP(precondition_frequency=2)], ids=lambda r: type(r).__name__
)
@pytest.mark.parametrize("mesh", [Mesh(dp=4), Mesh(dp=3, tp=2), Mesh(2, 2, 2), Mesh(tp=4), Mesh(replicate=2)], ids=str)
def test_loads_from_one_plan_are_what_each_rank_plans_for_itself(rule: Rule, mesh: Mesh) -> None:
    shapes = {k: v for k, v in SHAPES.items() if len(v) > 1 or rule.refuse(distopt.rule.Shape(1, 16, 1)) is None}
    layouts = {name: mesh.layout(shape, tensor_parallel_dim(name, shape)) for name, shape in shapes.items()}
    specs = tuple(Spec(name, layout, 0) for name, layout in layouts.items())
    loads = total(loads_of(plan_group(Group(rule, specs, gpu=True), 0), mesh, H100))
    assert loads.elements == sum(np.prod(shape) for shape in shapes.values())
    for rank in range(mesh.size):
        own = [layout_on(mesh, rank, layout) for layout in layouts.values()]
        specs = tuple(Spec(name, layout, layout.ranks.index(rank)) for name, layout in zip(shapes, own))
        summary = PlanReport([plan_group(Group(rule, specs, gpu=True), rank)], ["all"], rank).summary()
        found = {k: np.broadcast_to(getattr(loads, k), mesh.size)[rank] for k in ("sent", "received", "state", "flops")}
        assert found["sent"] == summary["bytes_sent_per_step"]
        assert found["received"] == summary["bytes_received_per_step"]
        assert found["state"] == summary["state_bytes"]
        assert found["flops"] == pytest.approx(summary["flops"])


@pytest.mark.parametrize("rule", [AdamW(), Muon()], ids=lambda r: type(r).__name__)
def test_partitioned_replicas_gather_what_each_rank_plans(rule: Rule) -> None:
    mesh, ranks = Mesh(replicate=3), (0, 1, 2)
    specs = tuple(Spec(name, Plain(shape, (0,)), 0) for name, shape in SHAPES.items() if len(shape) == 2)
    loads = total(loads_of(plan_group(Group(rule, specs, ranks), 0), mesh, CPU))
    for rank in ranks:
        own = tuple(replace(spec, layout=Plain(spec.layout.shape, (rank,))) for spec in specs)
        summary = PlanReport([plan_group(Group(rule, own, ranks), rank)], ["all"], rank).summary()
        assert loads.sent[rank] == summary["bytes_sent_per_step"]
        assert loads.received[rank] == summary["bytes_received_per_step"]
        assert loads.state[rank] == summary["state_bytes"]


def test_codes_take_less_state_than_fp32() -> None:
    model, mesh = model_of_shapes({"layers.0.up_proj.weight": (256, 512)}), Mesh(dp=4)
    plain = plan_model(model, "adamw", mesh, H100, gpu=True).total
    coded = plan_model(model, "adamw", mesh, H100, gpu=True, state_codec="int8").total
    assert plain.state.max() == 2 * 4 * 64 * 512
    assert plain.state.max() / 4 < coded.state.max() < plain.state.max() / 3
    assert coded.memory.max() < plain.memory.max()


def test_a_split_makes_matrices_of_their_own(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "model").write_text(json.dumps({"layers.0.qkv.weight": [96, 32], "layers.1.qkv.weight": [96, 32]}))
    words = ["plan", "--model", str(tmp_path / "model"), "--mesh", "dp=4", "--compare", "muon,soap"]
    main([*words, "--optimizer.split", "q,k,v", "--json", str(tmp_path / "plan.json")])
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert [sum(row["matrices"] for row in plan["rows"]) for plan in plans] == [6, 6]
    assert "soap" in capsys.readouterr().out


def test_what_a_mesh_cannot_be_is_said_by_name() -> None:
    assert Mesh.parse("tp=8, dp=16") == Mesh(1, 16, 8)
    for text, words in {
        "pp=4,dp=2": "no axis 'pp'", "dp=0": "positive integer", "dp=two": "positive integer", "dp=2,dp=4": "twice",
        "": "no axis",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Mesh.parse(text)


def test_a_layout_is_fsdp2s_with_tensor_parallelism() -> None:
    mesh = Mesh(2, 4, 2)
    column = mesh.layout((16, 6), 0)
    assert isinstance(column, Sharded)
    assert column.describe() == "StridedShard(0)/4×Shard(0)/2"
    assert column.ranks == tuple(range(8))
    assert mesh.layout((16, 6), 1).describe() == "Shard(0)/4×Shard(1)/2"
    assert mesh.layout((16,), None).ranks == (0, 2, 4, 6)
    assert Mesh(replicate=2).layout((16,), None) == Plain((16,), (0,))
    assert mesh.positions(mesh.layout((16,), None).ranks).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 2


def test_seconds_follow_rates() -> None:
    model, mesh = model_of_shapes(SHAPES), Mesh(dp=4)
    plan = plan_model(model, "muon", mesh, H100, gpu=True, strategy="owner")
    slow = replace(H100, flops={k: v / 1e6 for k, v in H100.flops.items()})
    slower = plan_model(model, "muon", mesh, slow, gpu=True, strategy="owner")
    assert slower.total.compute == pytest.approx(1e6 * plan.total.compute)
    assert slower.total.wire == pytest.approx(plan.total.wire)
    far = replace(H100, links=(replace(H100.links[0], bandwidth=1.0, latency=3.0),))
    waiting = plan_model(model, "muon", mesh, far, gpu=True, strategy="owner")
    # One bucket: there and back in bf16, the norm and the votes.
    busiest = np.maximum(plan.total.sent, plan.total.received).max()
    assert waiting.total.wire.max() == pytest.approx(2 * 3.0 + busiest, rel=0.5)
    assert waiting.verdict > 2 * 3.0


def test_the_choice_of_strategies_follows_rates() -> None:
    model, mesh = model_of_shapes({"layers.0.up_proj.weight": (4096, 64)}), Mesh(dp=4)
    far = replace(H100, links=(replace(H100.links[0], bandwidth=1e3, latency=1e-6),))
    chosen = [{row[1] for row in plan_model(model, "muon", mesh, r, gpu=True).rows} for r in (H100, far)]
    assert chosen == [{"gather"}, {"gram"}]


def test_a_cycle_has_every_refresh_once_in_its_turn() -> None:
    model, mesh = model_of_shapes({f"layers.{i}.up_proj.weight": (96, 64) for i in range(6)}), Mesh(dp=2)
    only_qr = replace(H100, flops={"float32": 1e30, "bfloat16": 1e30, "qr": 1e9})
    plans = {
        both: plan_model(model, "soap", mesh, only_qr, gpu=True, precondition_frequency=4, synchronous=both)
        for both in (False, True)
    }
    compute = {both: plan.total.compute for both, plan in plans.items()}
    assert compute[True].shape == compute[False].shape == (4, 2)
    # 12 sides are refreshed in a cycle, in whatever order.
    assert compute[False].sum() == pytest.approx(compute[True].sum())
    assert compute[True].sum() == pytest.approx(6 * 8 / 3 * (96**3 + 64**3) / 1e9, rel=1e-4)
    assert np.count_nonzero(compute[True].max(1) > 1e-9) == 1
    assert np.count_nonzero(compute[False].max(1) > 1e-9) == 4


def test_routing_is_create_optimizers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = read_model(str(tmp_path))
    assert all(param.is_meta for param in model.parameters())
    plan = plan_model(model, "muon", Mesh(dp=2, tp=2), H100, gpu=True)
    real = type(model)(model.config)  # type: ignore[operator]
    routing = distopt.create_optimizer("muon", real, lr=1e-3).routing
    hidden = sum(rule == "muon" for _, rule, _ in routing)
    assert hidden == 7 * 3 == sum(loads.matrices for group, _, loads in plan.rows if "muon" in group)
    assert plan.total.elements == sum(param.numel() for param in real.parameters())


def test_shapes_make_the_model_that_a_config_makes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = read_model(str(tmp_path / "config.json"))
    (tmp_path / "shapes.json").write_text(json.dumps({name: list(p.shape) for name, p in model.named_parameters()}))
    skeleton = read_model(str(tmp_path / "shapes.json"))
    one, other = (plan_model(m, "soap", Mesh(dp=3), H100, gpu=True).record() for m in (model, skeleton))
    assert one["per_rank"] == other["per_rank"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mesh", "pp=2", "--optimizer", "muon"], "no axis 'pp'"),
        (["--mesh", "dp=2", "--optimizer", "mooon"], "did you mean 'muon'"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--optimizer.ns_step", "3"], "ns_step"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--optimizer.ns_steps", "0"], "ns_steps must lie"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--rest.beta", "3"], "beta"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--speed", "3"], "unknown argument '--speed'"),
        (["--mesh", "dp=2", "--compare", "muon,soap", "--optimizer.speed", "3"], "none of muon, soap"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--partition"], "for replicas"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--rates", "absent.json"], "absent.json"),
        (["--mesh", "dp=2,tp=2", "--optimizer", "muon", "--model", "plain"], "no parameter of this model"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--model", "vectors"], "no parameter of this"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--model", "absent"], "no such file"),
        (["--mesh", "dp=2", "--optimizer", "muon", "--model", "wrong"], "neither a transformers config"),
    ],
)
def test_wrong_arguments_end_with_a_message(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    contents: dict[str, Any] = {
        "model": SHAPES,
        "plain": {"w": [8, 8]},
        "vectors": {"b": [8]},
        "wrong": {"w": "8 by 8"},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    model = str(tmp_path / (words.pop() if "--model" in words else "model"))
    words = [word for word in words if word != "--model"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", model, *words])
    assert said in str(ended.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: command; `distopt --help` explains"),
        (["plan", "--mesh", "dp=2", "--optimizer", "muon"], "--model; `distopt plan --help` explains"),
        (["plan", "--model", "x", "--mesh", "dp=2", "--optimzer", "muon"], "(--optimzer: did you mean --optimizer?)"),
        (["plan", "--model", "x", "--mesh", "dp=2", "--optimizer", "muon", "--partitoin"], "did you mean --partition?"),
        (["plan", "--model", "x", "--mesh", "dp=2", "--optimizer", "muon", "--compare", "adamw"], "not allowed with"),
        (["plam"], "invalid choice: 'plam'"),
    ],
)
def test_wrong_usage_ends_with_one_line_that_says_what_was_meant(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)


def test_options_are_values_of_json_dtypes_or_words() -> None:
    found = read_options(
        ["--optimizer.betas", "[0.9, 0.5]", "--optimizer.ns_dtype=bfloat16", "--optimizer.ns", "gram", "--rest.eps", "1e-9",
         "--optimizer.nesterov", "False"]
    )  # fmt: skip
    assert found["optimizer"] == {"betas": (0.9, 0.5), "ns_dtype": torch.bfloat16, "ns": "gram", "nesterov": False}
    assert found["rest"] == {"eps": 1e-9}


def test_command_prints_tables_and_writes_json_and_plot(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "model").write_text(json.dumps(SHAPES))
    files = {"--json": tmp_path / "plan.json", "--png": tmp_path / "plan.png"}
    main(
        ["plan", "--model", str(tmp_path / "model"), "--mesh", "dp=4,tp=2", "--compare", "adamw,muon,soap",
         "--optimizer.precondition_frequency", "5", *(str(word) for pair in files.items() for word in pair)]
    )  # fmt: skip
    printed = capsys.readouterr().out
    record = json.loads(files["--json"].read_text())
    assert [plan["optimizer"] for plan in record["plans"]] == ["adamw", "muon", "soap"]
    adamw, muon, soap = record["plans"]
    assert adamw["seconds"] == record["adamw_seconds"] < muon["seconds"]
    assert "1.00" in printed and "owner" in printed and "elementwise" in printed
    assert len(muon["per_rank"]["flops"]) == 8
    assert max(muon["per_rank"]["flops"]) / np.mean(muon["per_rank"]["flops"]) == pytest.approx(muon["flops_imbalance"])
    assert soap["worst_step_seconds"] > soap["seconds"]
    assert files["--png"].read_bytes().startswith(b"\x89PNG")


def test_a_thousand_ranks_take_one_plan_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []

    def counted(group: Group, rank: int) -> Any:
        ranks.append(rank)
        return plan_group(group, rank)

    monkeypatch.setattr("distopt.cli.plan.plan_group", counted)
    shapes = {
        name: shape for name, shape in llama3_8b().items() if not name.startswith("model.layers.") or ".1." in name
    }
    plan = plan_model(model_of_shapes(shapes), "soap", Mesh(dp=128, tp=8), H100, gpu=True)
    assert ranks == [0] * 3  # hidden matrices, embedding and head, norms
    moments = sum(2 * rows * cols for rows, cols in hidden_matrices(shapes).values())
    grams = sum(2 * n * n + 1 for shape in hidden_matrices(shapes).values() for n in shape if n <= 10000)
    kept = sum(loads.state.sum() for group, _, loads in plan.rows if "soap" in group)
    assert plan.total.state.shape == (1024,)
    assert kept == 4 * (moments + grams)
