"""AdminService: what operators may do to running requests, of all tenants.

Served to keys with the scope `admin`, or, where no keys are asked for, to this machine alone.

Hop 1. Knows nothing of how a budget is kept.
"""

from __future__ import annotations

from typing import Any

import grpc.aio

from cluster.errors import Forbidden, InvalidRequest
from cluster.gateway.access import Access
from cluster.gateway.budgets import RunningBudgets
from cluster.gateway.doorkeeper import caller_of
from cluster.gateway.requests import new_request_id
from cluster.gateway.status import abort
from cluster.keys import Scope
from mull.v1 import admin_pb2 as pb
from mull.v1.admin_pb2_grpc import AdminServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
_LOOPBACK = ("ipv4:127.", "ipv6:[::1]:", "ipv6:%5B::1%5D:", "ipv6:[::ffff:127.", "ipv6:%5B::ffff:127.", "unix:")


class AdminServicer(AdminServiceServicer):
    """Changes to what runs."""

    def __init__(self, budgets: RunningBudgets, access: Access) -> None:
        self._budgets = budgets
        self._access = access

    async def SetThinkingBudget(
        self, request: pb.SetThinkingBudgetRequest, context: Context
    ) -> pb.SetThinkingBudgetResponse:
        """Lower the thinking budget of requests that are under way."""
        try:
            self._check(context)
            return pb.SetThinkingBudgetResponse(num_lowered=self._lower(request))
        except Exception as error:
            await abort(context, error, new_request_id())

    def _check(self, context: Context) -> None:
        caller_of(context, self._access).check_scope(Scope.ADMIN)
        if not self._access.asks_for_keys and not is_loopback(context.peer()):
            raise Forbidden("AdminService is served to this machine alone; call it from there, or set up API keys")

    def _lower(self, request: pb.SetThinkingBudgetRequest) -> int:
        if not request.HasField("thinking_budget"):
            raise InvalidRequest("thinking_budget: missing; send a number of tokens", field="thinking_budget")
        match request.WhichOneof("target"):
            case "request_id":
                return self._budgets.lower(request.thinking_budget, request_id=request.request_id)
            case "tenant":
                return self._budgets.lower(request.thinking_budget, tenant=request.tenant)
            case "all":
                return self._budgets.lower(request.thinking_budget)
            case _:
                raise InvalidRequest("target: nothing given; send request_id, tenant or all", field="target")


def is_loopback(peer: str) -> bool:
    """Whether gRPC's name of a peer is this machine."""
    return peer.startswith(_LOOPBACK)
