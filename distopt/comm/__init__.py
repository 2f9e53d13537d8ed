"""Communication: process groups, the packed exchange, coalesced reductions, the pipeline of buckets."""
