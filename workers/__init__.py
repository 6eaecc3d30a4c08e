"""The data plane: one process per rank, synchronous. Knows slots and blocks, never requests or clients."""
