"""What each form of a tensor takes up, travels in and costs, as bare numbers: those of `ngd_dist.factors`.

B blocks, n rows of a factor, R kept rows.
"""

from dataclasses import dataclass, replace

__all__ = [
    "BYTES",
    "HALF",
    "FormCost",
    "aligned",
    "block_structure",
    "dense",
    "diagonal",
    "low_rank_structure",
    "plain",
    "root",
]

BYTES = 4  # of a float32
HALF = 2  # of a number in 16 bits
ALIGNMENT = 8  # bytes: where each tensor of a message begins

Fields = tuple[tuple[int, int], ...]  # numbers, and bytes of each


def aligned(nbytes: int) -> int:
    """Returns the bytes that a tensor takes up in a message."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class FormCost:
    """A tensor of a form: the numbers that are held, and that are remembered and summed over ranks.

    rounded: its fields on a wire of 16 bits. is_dense: whether it travels as a triangle, and its inverse may be kept
    in 16 bits. row_numbers: those of a row that it is estimated from; row_flops: the operations for one more row.
    sample_dims: the number of its dimensions that grow with the samples of a rank; until `of_samples` one counts.
    is_by_position: whether it grows with the positions of a sample, too. is_kept_once: whether an entry of a cache is
    the tensor of a statistic.
    """

    held: int
    packed: int
    rounded: Fields
    row_numbers: int
    row_flops: int
    inverse_flops: int = 0
    product_flops: int = 0
    is_dense: bool = False
    has_basis: bool = False
    blocks: int = 1
    sample_dims: int = 0
    is_by_position: bool = False
    is_kept_once: bool = False

    @property
    def is_rounded(self) -> bool:
        """Whether it travels in 16 bits, in part at least, on a wire of 16 bits."""
        return any(nbytes == HALF for _, nbytes in self.rounded)

    def on_wire(self, dtype: str) -> int:
        """Returns the bytes in which a statistic travels, in `NGDConfig.statistics_wire`."""
        fields = ((self.packed, BYTES),) if dtype == "float32" else self.rounded
        return sum(aligned(numbers * nbytes) for numbers, nbytes in fields)

    def in_cache(self, dtype: str) -> int:
        """Returns the bytes in which an entry of a cache travels, if inverses are kept in this dtype."""
        if not self.is_dense or dtype == "float32":
            return aligned(self.packed * BYTES)
        return aligned(self.packed * HALF) + (aligned(self.row_numbers * BYTES) if dtype == "float16" else 0)

    def cached_bytes(self, dtype: str) -> int:
        """Returns the bytes that an entry of a cache takes up while it is kept, beside statistics."""
        if self.is_kept_once:
            return 0
        if not self.is_dense or dtype == "float32":
            return self.held * BYTES
        return self.held * HALF + (self.row_numbers * BYTES if dtype == "float16" else 0)


def dense(blocks: int, n: int) -> FormCost:
    """Returns the cost of whole matrices, [B, n, n]: two operations for each multiply-add of 2 n^3 / 2."""
    packed = n * (n + 1) // 2
    return FormCost(
        held=blocks * n * n,
        packed=blocks * packed,
        rounded=((blocks * n, BYTES), (blocks * (packed - n), HALF)),
        row_numbers=blocks * n,
        row_flops=2 * blocks * n * n,
        inverse_flops=2 * blocks * n**3,
        product_flops=2 * n,
        is_dense=True,
        has_basis=True,
        blocks=blocks,
    )


def diagonal(blocks: int, n: int) -> FormCost:
    """Returns the cost of diagonals, [B, n]."""
    numbers = blocks * n
    return FormCost(
        held=numbers,
        packed=numbers,
        rounded=((numbers, BYTES),),
        row_numbers=numbers,
        row_flops=2 * numbers,
        inverse_flops=2 * numbers,
        product_flops=1,
        blocks=blocks,
    )


def root(blocks: int, rows: int, n: int) -> FormCost:
    """Returns the cost of R rows, [B, R, n], that stand for a matrix; its inverse is Woodbury's."""
    numbers = blocks * rows * n
    return FormCost(
        held=numbers,
        packed=numbers,
        rounded=((1, BYTES), (numbers, HALF)),
        row_numbers=blocks * n,
        row_flops=2 * numbers,
        inverse_flops=4 * blocks * rows**2 * n,
        product_flops=4 * rows,
        has_basis=False,
        blocks=blocks,
    )


def block_structure(blocks: int, width: int, rows: int) -> FormCost:
    """Returns the cost of the blocks along a diagonal, each of so many rows at most; a root takes four products."""
    rows = min(rows, width)
    count = blocks * -(-width // rows)
    matrices = dense(count, rows)
    return replace(matrices, row_numbers=blocks * width, inverse_flops=8 * count * rows**3, product_flops=4 * rows)


def low_rank_structure(blocks: int, width: int, rank: int) -> FormCost:
    """Returns the cost of `rank` rows of a matrix and its diagonal."""
    numbers = blocks * (rank + 1) * width
    return replace(
        plain(numbers, blocks * width, is_entrywise=True),
        inverse_flops=8 * blocks * rank**2 * width + 10 * blocks * width,
        product_flops=4 * rank + 2,
    )


def plain(numbers: int, row_numbers: int | None = None, *, is_entrywise: bool = False) -> FormCost:
    """Returns the cost of a tensor that stands for itself."""
    rounded: Fields = ((1, BYTES), (numbers, HALF)) if is_entrywise else ((numbers, BYTES),)
    return FormCost(numbers, numbers, rounded, row_numbers or numbers, 2 * numbers)
