"""Shapes, under a variant's options, for which a comparison is defined."""

from tests.cases import Options, Shape


def filled(shape: Shape, options: Options) -> bool:
    """There is a mean."""
    return 0 not in shape


def one_matrix(shape: Shape, options: Options) -> bool:
    """For packages that take a matrix or a vector that is not empty."""
    return 0 not in shape and len(shape) in (1, 2)


def up_to_matrix(shape: Shape, options: Options) -> bool:
    """A scalar as well."""
    return 0 not in shape and len(shape) < 3


def full_matrix(shape: Shape, options: Options) -> bool:
    """For packages that take a matrix that is not empty, nothing else."""
    return len(shape) == 2 and 0 not in shape


def not_rotated(shape: Shape, options: Options) -> bool:
    """SOAP is Adam on vectors, without amplification."""
    return len(shape) < 2


def full_rank(shape: Shape, options: Options) -> bool:
    """Both factors of a random gradient have full rank, so that their eigenbases are defined: no side that is
    preconditioned is longer than the other one."""
    rows, cols = shape[-2:] if len(shape) > 1 else (0, 1)
    limit = options.get("max_precond_dim", 10000)
    return rows > 0 and (rows > limit or rows <= cols) and (cols > limit or cols <= rows)


def full_rank_matrix(shape: Shape, options: Options) -> bool:
    """For packages that give a 3-D tensor three factors."""
    return len(shape) == 2 and full_rank(shape, options)


def iterated_full_rank(shape: Shape, options: Options) -> bool:
    """An iterated basis of a rank-deficient factor depends on its rounding: QR is compared where factors have rank."""
    return options.get("root") != "qr" or len(shape) < 2 or 0 in shape or shape[-1] == shape[-2]


def rank_within(shape: Shape, options: Options) -> bool:
    """apollo_torch's rank may be above the shorter side of a matrix; ours is cut to it."""
    return one_matrix(shape, options) and options.get("rank", 256) <= min(shape)


def scion_in_fp32(shape: Shape, options: Options) -> bool:
    """pytorch_optimizer's iterates in bf16; its signs take matrices, its root mean squares vectors."""
    return 0 not in shape and len(shape) == (2 if options.get("norm") else 1)
