"""The HTTP port under requests made of its own OpenAPI document, good and bad ones: no answer is a fault of ours."""

from __future__ import annotations

import schemathesis

from cluster.gateway.http.openapi import openapi_document
from tests.gateway.conftest import RunningGateway, gateway, gateway_config, router  # noqa: F401  # fixtures

SCHEMA = schemathesis.openapi.from_dict(openapi_document())
NUM_EXAMPLES = 25
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations()]
