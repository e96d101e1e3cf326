"""The bodies of requests, from what a Python producer gives."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from app import run_ids
from app.decode import decode_body
from app.errors import InvalidRequest
from schemas.operations import Operation, OperationRequest, Tenant
from schemas.requests import Environment, Options, TraceContext

AnyTenant = Environment | Tenant | Mapping[str, Any]
"""An environment as operations want it: `id`, `organization_id`, and whatever else a trigger's may have."""

_encode = msgspec.json.Encoder().encode
_operations: "msgspec.json.Decoder[OperationRequest]" = msgspec.json.Decoder(OperationRequest)


def request(
    task: str,
    payload: object = UNSET,
    *,
    environment: Environment | Mapping[str, Any],
    trace_context: TraceContext | Mapping[str, Any] | None = None,
    deadline: datetime | None = None,
    payload_type: str = "application/json",
    **options: Any,
) -> dict[str, Any]:
    """The body of a trigger request.

    `payload` is anything that JSON can hold, or ready JSON as `bytes` or `msgspec.Raw`, which must be
    valid. `options` are the fields of `schemas.requests.Options`; what is None counts as left out.

    Raises:
        TypeError: there is no option of that name.
    """
    unknown = sorted(options.keys() - set(Options.__struct_fields__))
    if unknown:
        raise TypeError(f"no such option: {', '.join(unknown)}")
    body: dict[str, Any] = {"task": task, "environment": environment, "payload_type": payload_type}
    if not isinstance(payload, UnsetType):
        body["payload"] = Raw(payload) if isinstance(payload, bytes) else payload
    body["options"] = {name: value for name, value in options.items() if value is not None}
    if trace_context is not None:
        body["trace_context"] = trace_context
    if deadline is not None:
        body["deadline"] = deadline
    return body


def operation(kind: type[Operation], environment: AnyTenant, **fields: Any) -> bytes:
    """The body of an operation as JSON, which the worker's own check has passed.

    What is None or UNSET counts as left out. Structs and mappings are alike.

    Raises:
        InvalidRequest: a field is missing, unknown, of the wrong type or over its limit, or nothing that JSON
            can hold; the message begins with its name.
    """
    given: dict[str, Any] = {"type": kind.__struct_config__.tag}
    given["environment"] = dict(environment) if isinstance(environment, Mapping) else environment
    given |= {name: value for name, value in fields.items() if value is not None and value is not UNSET}
    body = _encode({name: encoded(name, value) for name, value in given.items()})
    decode_body(body, len(body), _operations)
    return body


def encoded(name: str, value: object) -> Raw:
    """A field as JSON; `Raw` is JSON already.

    Raises:
        InvalidRequest: JSON cannot hold it; the message begins with the field's name.
    """
    if isinstance(value, Raw):
        return value
    try:
        return Raw(_encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"{name}: {error}") from error


def free_form(name: str, value: object) -> Raw | UnsetType:
    """Free-form JSON: anything that JSON can hold, or ready JSON as `bytes` or `msgspec.Raw`.

    Raises:
        InvalidRequest: see `encoded`.
    """
    if isinstance(value, UnsetType):
        return value
    return Raw(value) if isinstance(value, bytes) else encoded(name, value)


def new_run_id(environment: AnyTenant) -> str:
    """A run id of a producer's own choice, bound to the environment: no other one can use it.

    `environment` is not checked: whoever handles the request does that.
    """
    if isinstance(environment, Mapping):
        organization_id, environment_id = environment.get("organization_id"), environment.get("id")
    else:
        organization_id, environment_id = environment.organization_id, environment.id
    return run_ids.friendly(run_ids.bind(str(organization_id), str(environment_id)))
