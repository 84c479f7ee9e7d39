"""What ``/openapi.json`` says beyond what FastAPI reads from the routes: served names, streams, errors of all paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from client.api_keys import is_open
from client.deployment import Deployment
from client.routes.problem import dialect_of
from client.schemas.legacy import LegacyEvent
from client.schemas.openai_chat import ChatChunk
from client.schemas.openai_completion import CompletionChunk
from client.schemas.tgi import StreamEvent

STREAM_MODELS: tuple[type[BaseModel], ...] = (
    LegacyEvent,
    StreamEvent,
    ChatChunk,
    CompletionChunk,
)  # in streams only, where FastAPI does not look for models
EVERYWHERE = (408, 413, 431, 500)  # on every path, whatever its route
KEY_SCHEME = "api_key"
GUARDED = (401, 429)  # on every path but the open ones
_FRAMEWORK = ("HTTPValidationError", "ValidationError")  # FastAPI's own error bodies, which nothing here answers with
_REFERENCE = "#/components/schemas/{model}"


def describe(app: FastAPI, deployment: Deployment) -> None:
    """Make ``/openapi.json`` complete. FastAPI computes it once, when it is first asked for."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = _complete(plain(), [name for model in deployment.models for name in model.config.names])
            if deployment.config.server.api_key_file:
                _demand_keys(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]  # as FastAPI documents it


def _complete(schema: dict[str, Any], names: list[str]) -> dict[str, Any]:
    components = schema["components"]["schemas"]
    for model in STREAM_MODELS:
        described = model.model_json_schema(ref_template=_REFERENCE)
        components.update(described.pop("$defs", {}))
        components[model.__name__] = described
    for path, operation in _operations(schema):
        _add_errors(operation["responses"], path)
        for parameter in operation.get("parameters", ()):
            if parameter["name"] == "model":
                _name_models(parameter["schema"], names)
    for name in _FRAMEWORK:
        components.pop(name, None)
    return schema


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            yield path, operation


def _add_errors(responses: dict[str, Any], path: str) -> None:
    if _FRAMEWORK[0] in str(responses.get("422")):
        del responses["422"]
    dialect = dialect_of(path)
    body = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=dialect.model.__name__)}}}
    for status in EVERYWHERE if is_open(path) else (*EVERYWHERE, *GUARDED):
        responses.setdefault(str(dialect.statuses.get(status, status)), {"description": "Error", "content": body})


def _demand_keys(schema: dict[str, Any]) -> None:
    """Say that a key is needed, and where."""
    schema["components"]["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, operation in _operations(schema):
        if not is_open(path):
            operation["security"] = [{KEY_SCHEME: []}]


def _name_models(field: dict[str, Any], names: list[str]) -> None:
    """Say which names are served, where a route takes one."""
    [text] = [choice for choice in (field, *field.get("anyOf", ())) if choice.get("type") == "string"]
    text["enum"] = names
