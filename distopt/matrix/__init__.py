"""Linear algebra on stacks of plain matrices: no ranks, no states, no layouts."""
