"""Capacity and what-if: the production scheduler over a cost model, on a virtual clock. No torch, ray or grpc."""
