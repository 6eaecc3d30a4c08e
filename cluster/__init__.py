"""The control plane: asyncio, CPU, never a tensor."""
