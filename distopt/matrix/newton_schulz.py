"""Newton–Schulz: the nearest semi-orthogonal matrix, from matrix products alone.

For X = U S Vᵀ every method applies an odd polynomial to the singular values, `steps` times, which moves them towards 1:

    G = X Xᵀ                    the Gram matrix, short side × short side
    X ← a X + (b G + c G²) X

Methods:

* `quintic`: one triple (a, b, c) for all steps, as in Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/).
  With the default triple the singular values end between 0.68 and 1.20, not at 1.
* `polar_express`: a triple per step, each the best one for what the steps before it left
  (Amsel, Persson, Musco, Gower 2025, arXiv 2505.16932, Algorithm 1).
* `gram`: the quintic, evaluated on Gram matrices (Gram Newton–Schulz, https://github.com/Dao-AILab/gram-newton-schulz):
  the long side enters two products per segment instead of two per step. Only where that is fewer FLOPs. In bfloat16 its
  singular values reach 1.4 on ill-conditioned matrices.

All work on the wide orientation: a tall matrix is read as its transpose, without a copy.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["quintic", "polar_express", "gram"]
Coefficients = tuple[float, float, float]

MUON_COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)

# Algorithm 1 of arXiv 2505.16932, for singular values in [1e-3, 1]; steps beyond the table repeat its last row.
_POLAR_EXPRESS_TABLE: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Rounding can push a singular value out of the interval a polynomial was made for, where it grows without bound: the
# paper shrinks the norm, and the argument of all rows but the last, by this much.
_POLAR_EXPRESS_SAFETY = 1.01

# In the Gram form each step amplifies the rounding errors of the one before: two steps, then three between restarts.
_FIRST_SEGMENT, _SEGMENT = 2, 3

# No float32 or bfloat16 matrix of up to 2^28 elements overflows its sum of squares below this entry.
_LARGE_ENTRY, _SHRINK = 2.0**48, 2.0**-80

# A symmetric product is computed as four blocks of columns of the lower triangle (5/8 of the FLOPs) and mirrored. On
# CPU that wins from 512 rows on: 1.15x there, 1.4x from 768. Two or three blocks save less, six lose more to thin
# products. On CUDA it is a Triton kernel, not measured yet, and so off by default.
_TRIANGLE_BLOCKS, _TRIANGLE_ALIGN, _TRIANGLE_ROWS_CPU = 4, 64, 512

# Matrices of at most this many elements are multiplied as a batch, larger ones one after another in one workspace. On
# CPU a batch is 2 to 10 times faster below and no faster above; in float32 it gives the bits of single products, in
# bfloat16 it does not, and so is not used there.
_BATCH_ELEMENTS_CPU, _BATCH_ELEMENTS_ACCELERATOR = 2**15, 2**22


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    method: Method = "quintic",
    steps: int = 5,
    coefficients: Coefficients = MUON_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    symmetric: bool | None = None,
) -> Tensor:
    """Replaces the singular values of each matrix by values near 1 (see the module's docstring).

    A matrix is first divided by max(‖x‖_F, eps), in the order of operations of `torch.optim.Muon`: one whose norm is
    far below `eps`, or zero, stays near zero instead of being blown up. Finite entries of any size give a finite
    result; a NaN stays within its matrix. On CPU the result for a matrix depends neither on the size of the stack nor
    on the strides of the input.

    Args:
        x: (k, rows, cols) or (rows, cols), floating point; not modified. Any size may be 0.
        method: "quintic", "polar_express" or "gram".
        steps: iterations; 5 is the usual number for all methods.
        coefficients: (a, b, c) for "quintic" and "gram"; "polar_express" has its own and ignores these.
        eps: the smallest norm to divide by, in the units of `x`.
        dtype: of the products and the result: float32, bfloat16, float16 (normalized in float32 first) or float64.
            None means float32 on CPU and bfloat16 elsewhere.
        symmetric: compute one triangle only of the products that are symmetric. None means where that is faster; not
            used under torch.compile.

    Returns:
        A new tensor of the shape of `x` in `dtype`.

    Raises:
        ValueError: for an unknown method, a tensor that is no stack of matrices, or less than one step.
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(get_args(Method))}")
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be (k, rows, cols) or (rows, cols), got shape {tuple(x.shape)}")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    on_cpu = x.device.type in ("cpu", "meta")
    if dtype is None:
        dtype = torch.float32 if on_cpu else torch.bfloat16
    rows, cols = x.shape[-2:]
    tall = rows > cols
    if symmetric is None:
        symmetric = _by_triangles(x)
    schedule, safety = _schedule(method, steps, coefficients)
    by_gram = method == "gram" and gram_wins(rows, cols, steps)
    iterate = _iterate_by_gram if by_gram else _iterate
    updates = len(gram_segments(schedule)) if by_gram else steps

    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    if torch.compiler.is_compiling():  # dynamo refuses strided `out=`; the compiler plans the buffers itself
        _normalize(x, out, eps, safety)
        return iterate(out.mT, None, schedule, False).mT if tall else iterate(out, None, schedule, False)

    stack, results = (x, out) if x.ndim == 3 else (x.unsqueeze(0), out.unsqueeze(0))
    if on_cpu:
        batched = rows * cols <= _BATCH_ELEMENTS_CPU and dtype in (torch.float32, torch.float64)
    else:
        batched = rows * cols <= _BATCH_ELEMENTS_ACCELERATOR
    pairs = [(stack, results)] if batched else list(zip(stack.unbind(), results.unbind()))
    spare = torch.empty_like(pairs[0][1])
    for matrix, result in pairs:
        # An update goes from one of two buffers to the other: begin in the one that makes the last end in `result`.
        start, other = (result, spare) if updates % 2 == 0 else (spare, result)
        _normalize(matrix, start, eps, safety)
        iterate(start.mT if tall else start, other.mT if tall else other, schedule, symmetric)
    return out


def polar_express_coefficients(steps: int) -> list[Coefficients]:
    """The (a, b, c) of each of `steps` steps, safety factor included (arXiv 2505.16932, Algorithm 1)."""
    shrink = _POLAR_EXPRESS_SAFETY
    table = [(a / shrink, b / shrink**3, c / shrink**5) for a, b, c in _POLAR_EXPRESS_TABLE[:-1]]
    return [*table, *repeat(_POLAR_EXPRESS_TABLE[-1], max(0, steps - len(table)))][:steps]


def flops(rows: int, cols: int, method: Method = "quintic", steps: int = 5) -> int:
    """FLOPs of the products of `orthogonalize` for one matrix, counted in full (multiply and add are 2).

    With s the short and L the long side: 4 s²L + 2 s³ per step of "quintic" and "polar_express"; 4 s²L + (8m - 6) s³
    per segment of m steps of the Gram form, so 8 s²L + 28 s³ for 5 steps. "gram" counts what runs: the smaller of the
    two. Half of a symmetric product would do; `orthogonalize` computes 5/8 of it where that is faster.
    """
    short, long = min(rows, cols), max(rows, cols)
    quintic = steps * (4 * short**2 * long + 2 * short**3)
    return min(quintic, _gram_flops(short, long, steps)) if method == "gram" else quintic


def gram_wins(rows: int, cols: int, steps: int = 5) -> bool:
    """Whether the Gram form takes fewer FLOPs than the plain iteration; for 5 steps, beyond an aspect ratio of 1.5."""
    return flops(rows, cols, "gram", steps) < flops(rows, cols, "quintic", steps)


def gram_segments(schedule: Sequence[Coefficients]) -> list[Sequence[Coefficients]]:
    """Cuts a schedule into the runs of steps after which the Gram form begins again from a new X Xᵀ: 2, then 3 each."""
    cuts = [0, *range(_FIRST_SEGMENT, len(schedule), _SEGMENT), len(schedule)]
    return [schedule[i:j] for i, j in pairwise(cuts)]


@torch.no_grad()
def gram_transform(gram: Tensor, schedule: Sequence[Coefficients], *, symmetric: bool = False) -> Tensor:
    """The matrix Q for which Q X is what `len(schedule)` steps make of X, from G = X Xᵀ alone.

    A matrix whose long side is split over ranks needs nothing else: the sum of the ranks' Gram matrices, this, and one
    local product, once per segment of `gram_segments`. Longer schedules lose accuracy fast.

    Args:
        gram: (k, n, n) or (n, n), where X has at most norm 1 before the first step; not modified.
        schedule: (a, b, c) per step, at least one.
        symmetric: compute one triangle only of the products; as polynomials in G, all are symmetric.

    Returns:
        Q, of the shape and dtype of `gram`.
    """
    transform = gram  # replaced in the first step
    for step, (a, b, c) in enumerate(schedule):
        poly = _symmetric_product(gram, gram, symmetric, add=gram, beta=b, alpha=c)
        if step == 0:
            transform = poly.clone()
            transform.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            transform = _symmetric_product(transform, poly, symmetric, add=transform, beta=a)
        if step + 1 < len(schedule):  # X ← (aI + P) X makes (aI + P) G (aI + P) of G
            half = _symmetric_product(gram, poly, symmetric, add=gram, beta=a)
            gram = _symmetric_product(poly, half, symmetric, add=half, beta=a)
    return transform


@dataclass(frozen=True)
class Orthogonalize:
    """`orthogonalize` with its options: of whole matrices by calling it, or of slices of them that lie apart."""

    method: Method = "quintic"
    steps: int = 5
    coefficients: Coefficients = MUON_COEFFICIENTS
    eps: float = 1e-7
    dtype: torch.dtype = torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """(k, rows, cols) of whole matrices."""
        return orthogonalize(
            x, method=self.method, steps=self.steps, coefficients=self.coefficients, eps=self.eps, dtype=self.dtype
        )

    @torch.no_grad()
    def by_slices(self, x: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        """The same in the Gram form, whatever the method's own: from a slice (k, short, part of long) of each matrix.

        Yields what has to be summed over the slices of each matrix, and is sent the sums: the sum of squares
        (k, 1, 1), then a Gram matrix (k, short, short) per segment. Returns the slice of the result.
        """
        schedule, safety = _schedule(self.method, self.steps, self.coefficients)
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        norm = (yield norm.square()).sqrt().clamp(min=self.eps) * safety
        shrink = torch.where(norm > _LARGE_ENTRY, _SHRINK, 1.0)  # the norm may be beyond float32
        x = (x * shrink.float() / (norm * shrink).float()).to(self.dtype)
        for segment in gram_segments(schedule):
            gram = yield x @ x.mT
            x = gram_transform(gram, segment, symmetric=_by_triangles(gram)) @ x
        return x


def _schedule(method: Method, steps: int, coefficients: Coefficients) -> tuple[list[Coefficients], float]:
    """The triple of each step, and what the norm is multiplied by first."""
    if method == "polar_express":
        return polar_express_coefficients(steps), _POLAR_EXPRESS_SAFETY
    return [coefficients] * steps, 1.0


def _by_triangles(x: Tensor) -> bool:
    """Whether one triangle of a symmetric product is faster. Never on meta tensors: FLOPs are counted in full."""
    return x.device.type == "cpu" and min(x.shape[-2:]) >= _TRIANGLE_ROWS_CPU


def _gram_flops(short: int, long: int, steps: int) -> int:
    lengths = [len(segment) for segment in gram_segments([MUON_COEFFICIENTS] * steps)]
    return sum(4 * short**2 * long + (8 * length - 6) * short**3 for length in lengths)


def _normalize(x: Tensor, out: Tensor, eps: float, safety: float) -> None:
    """out ← x / (safety · max(‖x‖_F, eps)), each matrix by its own norm.

    Entries whose squares would overflow are scaled down by a power of two first; others are multiplied by exactly 1.
    """
    # float16 overflows on large gradients and loses small ones before the norm could bring them into range.
    work = torch.empty_like(out, dtype=torch.float32) if out.dtype == torch.float16 else out
    peak = x.abs().amax((-2, -1), keepdim=True)
    torch.mul(x, torch.where(peak > _LARGE_ENTRY, _SHRINK, 1.0), out=work)
    if work.dtype == torch.bfloat16:  # the bits of torch.optim.Muon
        norm = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True)
    else:  # one float32 sum over 2M squares is off by 4e-5 on CPU, the norm of the row norms by 3e-8, and it is faster
        norm = torch.linalg.vector_norm(work, dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(norm, dim=-2, keepdim=True)
    norm.clamp_(min=eps)
    if safety != 1.0:
        norm.mul_(safety)
    torch.div(work, norm, out=out)


def _iterate(x: Tensor, spare: Tensor | None, schedule: Sequence[Coefficients], symmetric: bool) -> Tensor:
    """Runs the iteration on wide matrices, from `x` to `spare` and back (both overwritten), or to new tensors."""
    addmm = torch.addmm if x.ndim == 2 else torch.baddbmm
    gram = poly = None
    if spare is not None:
        gram, poly = x.new_empty((2, *x.shape[:-1], x.shape[-2]))
    for a, b, c in schedule:
        g = _symmetric_product(x, x.mT, symmetric, out=gram)
        p = _symmetric_product(g, g, symmetric, add=g, beta=b, alpha=c, out=poly)
        x, spare = addmm(x, p, x, beta=a, out=spare), None if spare is None else x
    return x


def _iterate_by_gram(x: Tensor, spare: Tensor | None, schedule: Sequence[Coefficients], symmetric: bool) -> Tensor:
    """As `_iterate`, in the Gram form: one update of X per segment."""
    mm = torch.mm if x.ndim == 2 else torch.bmm
    for segment in gram_segments(schedule):
        gram = _symmetric_product(x, x.mT, symmetric)
        transform = gram_transform(gram, segment, symmetric=symmetric)
        x, spare = mm(transform, x, out=spare), None if spare is None else x
    return x


def _symmetric_product(
    x: Tensor,
    y: Tensor,
    triangle: bool,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """x y, or beta · add + alpha · x y, where the result is known to be symmetric; one triangle only if told so."""
    mm, addmm = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    if not triangle:
        return mm(x, y, out=out) if add is None else addmm(add, x, y, beta=beta, alpha=alpha, out=out)
    if x.is_cuda and x.dtype != torch.float64:
        from distopt.matrix.symmetric import symmetric_product  # importing Triton takes a second

        return symmetric_product(x, y, add=add, beta=beta, alpha=alpha, out=out)
    size = x.shape[-2]
    if out is None:
        out = x.new_empty((*x.shape[:-1], size))
    width = _TRIANGLE_ALIGN * -(-size // (_TRIANGLE_BLOCKS * _TRIANGLE_ALIGN))
    for i in range(0, size, width):
        j = min(i + width, size)
        left, right, target = x[..., i:, :], y[..., i:j], out[..., i:, i:j]
        if add is None:
            mm(left, right, out=target)
        else:
            addmm(add[..., i:, i:j], left, right, beta=beta, alpha=alpha, out=target)
        out[..., i:j, j:].copy_(out[..., j:, i:j].mT)
    return out
