"""The pure linear algebra, against naive float64."""

import math
from itertools import repeat

import pytest
import torch
from pytorch_optimizer import SOAP as OracleSOAP
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_muon
from torch.utils.flop_counter import FlopCounterMode

from distopt.matrix.eigenbasis import eigenbasis, eigh, refresh, reorder
from distopt.matrix.inverse_root import inverse_root
from distopt.matrix.newton_schulz import (
    MUON_COEFFICIENTS,
    flops,
    gram_segments,
    gram_transform,
    gram_wins,
    orthogonalize,
    polar_express_coefficients,
)

SHAPES = [
    (1, 1),
    (1, 50),
    (50, 1),
    (2, 3),
    (16, 16),
    (33, 17),
    (40, 100),
    (300, 90),
    (130, 700),
    (520, 600),
    (640, 513),
]
METHODS = ["quintic", "polar_express", "gram"]


def schedule_of(method: str, steps: int = 5) -> list[tuple[float, float, float]]:
    return polar_express_coefficients(steps) if method == "polar_express" else [MUON_COEFFICIENTS] * steps


def naive(x: Tensor, method: str = "quintic", steps: int = 5, eps: float = 1e-7) -> Tensor:
    """The polynomial applied to the singular values themselves, in float64."""
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / values.square().sum().sqrt().clamp(min=eps)
    if method == "polar_express":
        values = values / 1.01
    for a, b, c in schedule_of(method, steps):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def rel(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def conditioned(rows: int, cols: int, smallest: float) -> Tensor:
    """A matrix whose singular values fall from 1 to `smallest`."""
    size = min(rows, cols)
    left, right = (torch.linalg.qr(torch.randn(n, size, dtype=torch.float64))[0] for n in (rows, cols))
    return (left * torch.logspace(0, math.log10(smallest), size, dtype=torch.float64)) @ right.T


# Newton–Schulz


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_matches_the_polynomial_on_singular_values(shape: tuple[int, int], method: str) -> None:
    x = torch.randn(shape)
    assert rel(orthogonalize(x, method=method), naive(x, method)) < 1e-5
    assert rel(orthogonalize(x, method=method, dtype=torch.float64), naive(x, method)) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 10])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_steps_ends_in_the_result(method: str, steps: int) -> None:
    for shape in [(20, 90), (90, 20), (200, 520)]:
        x = torch.randn(shape, dtype=torch.float64)
        out = orthogonalize(x, method=method, steps=steps, dtype=torch.float64)
        assert rel(out, naive(x, method, steps)) < 1e-9


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (16, 16), (33, 17), (40, 100), (300, 90), (200, 300)])
def test_bfloat16_gives_the_bits_of_torch_muon(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    assert torch.equal(
        orthogonalize(x, dtype=torch.bfloat16), torch_muon(x.clone(), MUON_COEFFICIENTS, ns_steps=5, eps=1e-7)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)])
@pytest.mark.parametrize("method", METHODS)
def test_half_precisions_are_close(method: str, dtype: torch.dtype, tolerance: float) -> None:
    for shape in [(40, 100), (90, 30), (64, 64)]:
        x = torch.randn(shape)
        out = orthogonalize(x, method=method, dtype=dtype)
        assert out.dtype == dtype
        assert rel(out, naive(x, method)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 5), (16, 16), (33, 17), (100, 31), (128, 256), (181, 190)])
def test_bits_do_not_depend_on_the_stack_or_the_strides(
    shape: tuple[int, int], method: str, dtype: torch.dtype
) -> None:
    x = torch.randn(9, *shape)
    stacked = orthogonalize(x, method=method, dtype=dtype)
    strided = orthogonalize(x.mT.contiguous().mT, method=method, dtype=dtype)
    assert torch.equal(stacked, strided)
    for i in range(9):
        assert torch.equal(stacked[i], orthogonalize(x[i], method=method, dtype=dtype))
        assert torch.equal(stacked[i : i + 1], orthogonalize(x[i : i + 1], method=method, dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
def test_bits_of_large_matrices_do_not_depend_on_the_stack(method: str) -> None:
    x = torch.randn(2, 520, 600)
    stacked = orthogonalize(x, method=method, steps=2)
    assert torch.equal(stacked[1], orthogonalize(x[1], method=method, steps=2))
    assert torch.equal(stacked, orthogonalize(x, method=method, steps=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 64, 64), (65, 200), (300, 257), (520, 520)])
def test_one_triangle_is_the_whole_product(shape: tuple[int, ...], method: str) -> None:
    x = torch.randn(shape)
    half, full = (orthogonalize(x, method=method, symmetric=symmetric) for symmetric in (True, False))
    assert rel(half, full) < 2e-6  # twice what the float32 results are from float64
    with FlopCounterMode(display=False) as half_count:
        orthogonalize(x, method=method, symmetric=True)
    with FlopCounterMode(display=False) as full_count:
        orthogonalize(x, method=method, symmetric=False)
    assert (half_count.get_total_flops() < full_count.get_total_flops()) == (min(shape[-2:]) > 64)


def test_input_is_left_alone() -> None:
    x = torch.randn(2, 30, 20)
    before = x.clone()
    for dtype in (torch.float32, torch.bfloat16):
        for method in METHODS:
            orthogonalize(x.requires_grad_(), method=method, dtype=dtype)
    assert torch.equal(x, before)
    assert not orthogonalize(x).requires_grad


def test_empty_stacks_and_sides() -> None:
    for shape in [(0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 5), (5, 0)]:
        assert orthogonalize(torch.empty(shape), dtype=torch.bfloat16).shape == shape


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e20, 1e30, 1e38])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_every_scale_is_right(scale: float, dtype: torch.dtype, tolerance: float) -> None:
    for shape in [(40, 90), (90, 40)]:
        x = torch.randn(shape).clamp(-3, 3) * scale
        out, reference = orthogonalize(x, dtype=dtype), naive(x)
        if reference.abs().max() < torch.finfo(dtype).tiny:
            assert out.isfinite().all()
            assert out.abs().max() < 1e-3  # float16 has no such numbers
        else:
            assert rel(out, reference) < tolerance


def test_scaling_by_a_power_of_two_does_not_change_the_bits_of_large_matrices() -> None:
    x = torch.randn(30, 40)
    assert torch.equal(orthogonalize(x * 2.0**100), orthogonalize(x))


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_rank_one_matrices(method: str) -> None:
    for shape in [(8, 20), (20, 8), (12, 12)]:
        assert torch.equal(orthogonalize(torch.zeros(shape), method=method), torch.zeros(shape))
        left, right = torch.randn(shape[0], 1), torch.randn(1, shape[1])
        # Rounding leaves 1e-7 in the empty directions, and five steps multiply what is small by up to 500.
        assert rel(orthogonalize(left @ right, method=method), naive(left @ right, method)) < 2e-4
    stack = torch.stack([torch.zeros(8, 20), torch.randn(8, 20), torch.full((8, 20), torch.nan)])
    out = orthogonalize(stack, method=method)
    assert torch.equal(out[:2], orthogonalize(stack[:2], method=method))
    assert out[2].isnan().all()


def test_polar_express_brings_its_whole_interval_near_one() -> None:
    """The paper's point: the quintic stops at an error of .5 there, these polynomials converge."""
    for steps, bound in [(5, 0.16), (6, 7e-3), (7, 2e-5), (8, 1e-12)]:
        values = torch.logspace(-3, 0, 10000, dtype=torch.float64) / 1.01
        for a, b, c in polar_express_coefficients(steps):
            values = a * values + b * values**3 + c * values**5
        assert (values - 1).abs().max() < bound, steps
    x = conditioned(60, 200, 0.1)
    ours = orthogonalize(x, method="polar_express", steps=8, dtype=torch.float64)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert rel(ours, left @ right) < 1e-10


def test_polar_express_repeats_its_last_polynomial() -> None:
    assert polar_express_coefficients(10) == [*polar_express_coefficients(8), *repeat((1.875, -1.25, 0.375), 2)]
    assert polar_express_coefficients(3) == polar_express_coefficients(5)[:3]


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(20, 60), (200, 64), (64, 1000)])
def test_gram_form_matches_the_quintic(shape: tuple[int, int], smallest: float) -> None:
    x = conditioned(*shape, smallest)
    assert gram_wins(*shape)
    assert rel(orthogonalize(x.float(), method="gram"), naive(x)) < 1e-4
    assert rel(orthogonalize(x.float(), method="gram"), orthogonalize(x.float())) < 1e-4


def test_gram_form_is_used_where_it_is_fewer_flops() -> None:
    square, wide = torch.randn(40, 40), torch.randn(40, 80)
    assert torch.equal(orthogonalize(square, method="gram"), orthogonalize(square))
    assert not torch.equal(orthogonalize(wide, method="gram"), orthogonalize(wide))
    assert [gram_wins(100, cols) for cols in (100, 150, 151, 800)] == [False, False, True, True]


def test_gram_transforms_of_a_split_long_side_add_up() -> None:
    """The Gram strategy: no piece sees more than the sum of X Xᵀ."""
    x = torch.randn(24, 100)
    pieces = list((x / x.norm()).split([30, 0, 70], dim=1))
    for segment in gram_segments([MUON_COEFFICIENTS] * 5):
        gram = sum((piece @ piece.T for piece in pieces), torch.zeros(24, 24))
        before = gram.clone()
        pieces = [gram_transform(gram, segment) @ piece for piece in pieces]
        assert torch.equal(gram, before)
    assert rel(torch.cat(pieces, 1), naive(x)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 100), (700, 200), (20, 20), (1, 9)])
def test_flops_are_those_of_the_products(shape: tuple[int, int], method: str) -> None:
    for steps in (1, 2, 5, 8):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.empty(3, *shape, device="meta"), method=method, steps=steps)
        assert counter.get_total_flops() == 3 * flops(*shape, method, steps)
    assert flops(30, 100) == 20 * 30**2 * 100 + 10 * 30**3
    assert flops(30, 100, "gram") == 8 * 30**2 * 100 + 28 * 30**3


def test_orthogonalize_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"method='cubic'.*quintic"):
        orthogonalize(torch.randn(2, 2), method="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(k, rows, cols\).*\(4,\)"):
        orthogonalize(torch.randn(4))
    with pytest.raises(ValueError, match="steps=0"):
        orthogonalize(torch.randn(2, 2), steps=0)


@pytest.mark.slow
def test_orthogonalize_compiles_into_one_graph() -> None:
    compiled = torch.compile(orthogonalize, fullgraph=True)
    for shape in [(3, 40, 60), (60, 40), (2, 520, 600)]:
        x = torch.randn(shape)
        for method in ("quintic", "gram"):
            assert rel(compiled(x, method=method), orthogonalize(x, method=method)) < 2e-6


# Eigenbases


def grams(k: int, n: int, samples: int) -> Tensor:
    x = torch.randn(k, n, samples)
    return x @ x.mT / samples


def assert_orthonormal(q: Tensor) -> None:
    torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).expand_as(q), atol=2e-5, rtol=0)


def test_eigenbasis_diagonalizes_in_descending_order() -> None:
    gram = grams(4, 33, 100)
    basis = eigenbasis(gram)
    assert basis.ok.all()
    assert_orthonormal(basis.q)
    rotated = basis.q.mT.double() @ gram.double() @ basis.q.double()
    values = rotated.diagonal(dim1=-2, dim2=-1)
    assert (rotated - torch.diag_embed(values)).abs().max() < 1e-5
    assert (values.diff() <= 1e-6).all()
    torch.testing.assert_close(values, torch.linalg.eigvalsh(gram.double()).flip(-1), atol=1e-5, rtol=1e-5)


def test_eigenbasis_has_the_bits_of_one_matrix_alone() -> None:
    gram = grams(7, 21, 5)  # odd, rank-deficient: where batched solvers differ
    basis, alone = eigenbasis(gram), [eigenbasis(matrix[None]).q for matrix in gram]
    assert torch.equal(basis.q, torch.cat(alone))
    for i, matrix in enumerate(gram):
        assert torch.equal(basis.q[i], torch.linalg.eigh(matrix + 1e-30 * torch.eye(21))[1].flip(-1))


def test_refresh_has_the_bits_of_one_matrix_alone() -> None:
    gram, q = grams(7, 21, 5), eigenbasis(grams(7, 21, 30)).q
    together, alone = refresh(gram, q), [refresh(matrix[None], basis[None]) for matrix, basis in zip(gram, q)]
    assert torch.equal(together.q, torch.cat([basis.q for basis in alone]))
    assert torch.equal(together.order, torch.cat([basis.order for basis in alone]))


def test_refresh_is_the_oracle_to_the_bit() -> None:
    """Bases, their order, and the second moment that moves with them, on both sides of a matrix."""
    left, right, moment = grams(1, 12, 40), grams(1, 20, 60), torch.rand(1, 12, 20)
    bases = [eigenbasis(gram + 0.3 * grams(1, gram.shape[-1], 50)).q for gram in (left, right)]
    bases = [q[..., torch.randperm(q.shape[-1])] for q in bases]  # something to sort
    state = {"exp_avg_sq": moment[0].clone(), "GG": [left[0], right[0]], "Q": [q[0] for q in bases]}
    oracle = OracleSOAP([torch.nn.Parameter(torch.zeros(2, 2))])
    expected = oracle.get_orthogonal_matrix_qr(state)

    ours = [refresh(left, bases[0]), refresh(right, bases[1])]
    assert torch.equal(ours[0].q[0], expected[0])
    assert torch.equal(ours[1].q[0], expected[1])
    moved = reorder(reorder(moment, ours[0].order, -2), ours[1].order, -1)
    assert torch.equal(moved[0], state["exp_avg_sq"])
    assert not torch.equal(moved, moment)
    assert torch.equal(eigenbasis(left).q[0], oracle.get_orthogonal_matrix([left[0]])[0])


def test_refresh_converges_to_the_eigenbasis() -> None:
    gram = torch.diag_embed(2.0 ** -torch.arange(10.0)).expand(3, 10, 10)
    rotation = torch.linalg.qr(torch.randn(3, 10, 10))[0]
    gram = rotation @ gram @ rotation.mT
    q = torch.eye(10).expand(3, 10, 10)
    for _ in range(40):
        basis = refresh(gram, q)
        assert basis.ok.all()
        q = basis.q
    rotated = q.mT @ gram @ q
    assert (rotated - torch.diag_embed(2.0 ** -torch.arange(10.0))).abs().max() < 1e-5


def test_reorder_follows_the_basis() -> None:
    order = torch.stack([torch.randperm(5) for _ in range(3)])
    x = torch.randn(3, 5, 4)
    for i in range(3):
        assert torch.equal(reorder(x, order, -2)[i], x[i][order[i]])
        assert torch.equal(reorder(x.mT, order, -1)[i], x[i].T[:, order[i]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gram_keeps_the_old_basis(bad: float) -> None:
    old, gram = eigenbasis(grams(3, 9, 20)).q, grams(3, 9, 20)
    clean_basis, clean_refresh = eigenbasis(gram), refresh(gram, old)
    gram[1, 4, 2] = bad
    for new, clean in [(eigenbasis(gram, old), clean_basis), (refresh(gram, old), clean_refresh)]:
        assert new.ok.tolist() == [True, False, True]
        assert torch.equal(new.q[1], old[1])
        assert torch.equal(new.order[1], torch.arange(9))
        assert torch.equal(new.q[::2], clean.q[::2])
    assert torch.equal(eigenbasis(gram).q[1], torch.eye(9))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e36])
@pytest.mark.parametrize("samples", [1, 4, 40])
def test_bases_are_orthonormal_at_every_scale_and_rank(scale: float, samples: int) -> None:
    gram = grams(2, 16, samples) * scale
    basis = eigenbasis(gram)
    assert basis.ok.all()
    assert_orthonormal(basis.q)
    for start in (basis.q, torch.eye(16).expand(2, 16, 16)):
        new = refresh(gram, start)
        assert new.ok.all()
        assert_orthonormal(new.q)
        assert (new.order.sort().values == torch.arange(16)).all()


def test_overflow_against_the_basis_keeps_it() -> None:
    q = torch.linalg.qr(torch.randn(1, 64, 64))[0]
    new = refresh(torch.full((1, 64, 64), 3e38), q)
    assert not new.ok.any()
    assert torch.equal(new.q, q)


def test_a_failing_solver_is_retried_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    solve, gram, old = torch.linalg.eigh, grams(2, 9, 20), eigenbasis(grams(2, 9, 30)).q

    def fails_in(*dtypes: torch.dtype) -> None:
        def fake(x: Tensor) -> tuple[Tensor, Tensor]:
            if x.dtype in dtypes:
                raise torch.linalg.LinAlgError("did not converge")
            return solve(x)

        monkeypatch.setattr(torch.linalg, "eigh", fake)

    fails_in(torch.float32)
    basis = eigenbasis(gram, old)
    assert basis.ok.all()
    expected = solve(gram[0].double())[1].flip(-1).float()
    torch.testing.assert_close((basis.q[0] * expected).sum(0).abs(), torch.ones(9))
    assert inverse_root(gram, 4).ok.all()

    fails_in(torch.float32, torch.float64)
    assert eigh(gram[0]) is None
    basis = eigenbasis(gram, old)
    assert not basis.ok.any()
    assert torch.equal(basis.q, old)
    previous = torch.randn(2, 9, 9)
    root = inverse_root(gram, 4, previous=previous)
    assert not root.ok.any()
    assert torch.equal(root.root, previous)


def test_bfloat16_grams_are_computed_in_float32() -> None:
    gram = grams(2, 12, 30).bfloat16()
    basis = eigenbasis(gram)
    assert basis.q.dtype == torch.bfloat16
    assert torch.equal(basis.q, eigenbasis(gram.float()).q.bfloat16())
    assert refresh(gram, basis.q).q.dtype == torch.bfloat16


def test_empty_stacks_of_bases_and_roots() -> None:
    empty = torch.empty(0, 5, 5)
    assert eigenbasis(empty).q.shape == refresh(empty, empty).q.shape == inverse_root(empty, 4).root.shape == (0, 5, 5)
    assert refresh(empty, empty).order.shape == (0, 5)


# Inverse roots


def naive_root(a: Tensor, p: int, ridge: float) -> Tensor:
    values, vectors = torch.linalg.eigh(a.double())
    return (vectors * (values.clamp(min=0) + ridge).pow(-1 / p)[..., None, :]) @ vectors.mT


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("method", "tolerance"), [("eigh", 2e-5), ("newton", 2e-4), ("qr", 2e-5)])
def test_roots_match_float64(method: str, tolerance: float, p: int) -> None:
    """Newton's tolerance is its ridge, 1e-6 ‖A‖, on a smallest eigenvalue of about .04."""
    for n in (1, 2, 9, 40):
        a = grams(3, n, 2 * n) + 0.01 * torch.eye(n)
        basis = eigenbasis(a).q if method == "qr" else None
        found = inverse_root(a, p, method=method, basis=basis)
        assert found.ok.all()
        assert rel(found.root, naive_root(a, p, 1e-12)) < tolerance


@pytest.mark.parametrize("method", ["eigh", "newton", "qr"])
def test_a_root_undoes_its_matrix(method: str) -> None:
    a = grams(2, 20, 60)
    found = inverse_root(a, 4, method=method, basis=eigenbasis(a).q).root
    powered = found @ found @ found @ found @ a
    assert (powered - torch.eye(20)).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30])
@pytest.mark.parametrize("method", ["eigh", "newton", "qr"])
def test_roots_are_right_at_every_scale(method: str, scale: float) -> None:
    a = (grams(2, 16, 50) + 0.1 * torch.eye(16)) * scale
    found = inverse_root(a, 4, method=method, basis=eigenbasis(a).q)
    assert found.ok.all()
    assert rel(found.root, naive_root(a, 4, 1e-12)) < 2e-4


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("method", ["eigh", "newton", "qr"])
def test_roots_of_singular_factors_precondition_what_they_have_seen(method: str, samples: int, scale: float) -> None:
    """Finite everywhere, never larger than eps allows, and right on the range of the factor."""
    x = torch.randn(1, 16, samples)
    a = x @ x.mT * scale
    basis = torch.linalg.eigh(a.double())[1].flip(-1).float()  # as good as a basis gets
    found = inverse_root(a, 4, method=method, eps=1e-6, basis=basis)
    assert found.ok.all()
    assert found.root.isfinite().all()
    assert torch.linalg.matrix_norm(found.root, 2).item() <= 1.01 * 1e-6**-0.25
    seen = torch.linalg.qr(x)[0]
    expected = naive_root(a, 4, 1e-6) @ seen.double()
    if scale <= 1:  # above, rounding in A itself (1e-7 ‖A‖) is far larger than eps
        assert rel(seen.mT @ found.root @ seen, seen.mT.double() @ expected) < 2e-2


def test_qr_follows_a_drifting_factor() -> None:
    a = grams(2, 24, 100)
    basis = None
    for _ in range(30):
        a = a.lerp(grams(2, 24, 100), 0.02)
        found = inverse_root(a, 4, method="qr", basis=basis)
        basis = found.basis
    assert rel(found.root, naive_root(a, 4, 1e-12)) < 0.05
    assert rel(inverse_root(a, 4, method="qr", basis=torch.eye(24).expand(2, 24, 24)).root, found.root) > 0.05


@pytest.mark.parametrize("method", ["eigh", "newton", "qr"])
def test_non_finite_factor_keeps_the_last_root(method: str) -> None:
    a = grams(3, 8, 30)
    basis, previous = eigenbasis(a).q, torch.randn(3, 8, 8)
    clean = inverse_root(a, 2, method=method, basis=basis)
    a[1, 0, 0] = math.nan
    found = inverse_root(a, 2, method=method, basis=basis, previous=previous)
    assert found.ok.tolist() == [True, False, True]
    assert torch.equal(found.root[1], previous[1])
    assert torch.equal(found.root[::2], clean.root[::2])
    assert torch.equal(inverse_root(a, 2, method=method, basis=basis).root[1], torch.eye(8))


@pytest.mark.parametrize("method", ["eigh", "newton", "qr"])
def test_roots_have_the_bits_of_one_matrix_alone(method: str) -> None:
    a = grams(5, 15, 8)
    basis = eigenbasis(a).q
    together = inverse_root(a, 4, method=method, basis=basis).root
    for i in range(5):
        assert torch.equal(together[i], inverse_root(a[i : i + 1], 4, method=method, basis=basis[i : i + 1]).root[0])


def test_newton_is_retried_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    power, seen = torch.linalg.matrix_power, []

    def diverges_in_single(x: Tensor, p: int) -> Tensor:
        seen.append(x.dtype)
        return power(x, p) * (math.nan if x.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.linalg, "matrix_power", diverges_in_single)
    a = grams(1, 12, 40)
    found = inverse_root(a, 4, method="newton")
    assert found.ok.all()
    assert seen[0] == torch.float32
    assert seen[-1] == torch.float64
    assert rel(found.root, naive_root(a, 4, 1e-12)) < 2e-4


def test_everything_traces_on_meta_tensors() -> None:
    a = torch.empty(2, 6, 6, device="meta")
    assert eigenbasis(a).q.shape == refresh(a, a).q.shape == a.shape
    for method in ("eigh", "newton", "qr"):
        with FlopCounterMode(display=False) as counter:
            assert inverse_root(a, 4, method=method, basis=a).root.shape == a.shape
        assert counter.get_total_flops() > 0


def test_inverse_root_refuses_what_it_cannot_do() -> None:
    a = torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"method='cholesky'.*eigh"):
        inverse_root(a, 4, method="cholesky")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p=0"):
        inverse_root(a, 0)
    with pytest.raises(ValueError, match=r"eps=0\.0"):
        inverse_root(a, 4, eps=0.0)
