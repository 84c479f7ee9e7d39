"""``docs/api.md``, written from what the app says of itself at ``/openapi.json``: ``python -m client.api_document``.

A test compares the two, so the document cannot say anything else than the code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from client.schemas.request_body import says_nothing
from client.server_app_post import create_app
from config import serving_config

CONFIG = "config/standin.yaml"  # any deployment has the same routes
DOCUMENT = Path("docs/api.md")
HEAD = """# The routes

What `/openapi.json` says, for people: what each route takes, and what its answers hold. `python -m client.api_document`
writes this file. [requests.md](requests.md) explains the routes, [errors.md](errors.md) lists what can go wrong.
"""

Json = Mapping[str, Any]


def document(schema: Json) -> str:
    """The whole document, from an OpenAPI description."""
    parts = [HEAD]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append("\n".join(_route(method.upper(), path, operation)))
    parts.append("# What they take and give\n")
    for name, model in sorted(schema["components"]["schemas"].items()):
        parts.append("\n".join(_model(name, model)))
    return "\n".join(parts).replace("``", "`")


def _route(method: str, path: str, operation: Json) -> Iterator[str]:
    yield f"## `{method} {path}`\n"
    yield operation["description"] + "\n"
    for parameter in operation.get("parameters", ()):
        yield f"- `{parameter['name']}` in the {parameter['in']}: {parameter['description']}"
    if "requestBody" in operation:
        yield f"- takes {_contents(operation['requestBody'])}"
    errors: dict[str, list[str]] = {}
    for status, response in operation["responses"].items():
        if status.startswith("2"):
            yield f"- {status}: {_contents(response)}"
        else:
            errors.setdefault(_contents(response), []).append(status)
    for body, statuses in errors.items():
        yield f"- {', '.join(sorted(statuses))}: {body}"
    yield ""


def _contents(response: Json) -> str:
    return (
        " or ".join(_content(kind, content.get("schema", {})) for kind, content in response.get("content", {}).items())
        or "nothing"
    )


def _content(kind: str, schema: Json) -> str:
    if kind == "application/json":
        return _type(schema)
    data = schema.get("properties", {}).get("data", {})
    held = [choice for choice in data.get("anyOf", [data]) if choice]
    if not held:
        return f"`{kind}`"
    return f"`{kind}`, whose data is {' or at last '.join(_type(one.get('contentSchema', one)) for one in held)}"


def _model(name: str, model: Json) -> Iterator[str]:
    yield f"## {name}\n"
    if "description" in model:
        yield model["description"] + "\n"
    for example in model.get("examples", ()):
        yield f"```json\n{json.dumps(example, ensure_ascii=False)}\n```\n"
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for field, rules in model["properties"].items():
        default = _default(rules, needed=field in model.get("required", ()))
        yield f"| `{field}` | {_type(rules)} | {default} | {rules.get('description', '')} |"
    yield ""


def _default(rules: Json, *, needed: bool) -> str:
    if needed or "default" not in rules:
        return ""
    value = rules["default"]
    return "" if isinstance(value, dict) else f"`{json.dumps(value)}`"


def _type(rules: Json) -> str:
    """``integer, 1 … 8, or null``"""
    if "$ref" in rules:
        name = rules["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in rules:
        return " or ".join(dict.fromkeys(map(_type, rules["anyOf"])))
    if "enum" in rules:  # without the ways to say nothing, except where nothing else may be said
        values = [value for value in rules["enum"] if not says_nothing(value)] or [None]
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if "const" in rules:
        return f"`{json.dumps(rules['const'])}`"
    if "items" in rules:
        return f"list of {_type(rules['items'])}"
    kinds = rules.get("type", "anything")
    text = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    for limit, words in (
        ("exclusiveMinimum", "above"),
        ("minimum", "at least"),
        ("maximum", "at most"),
        ("minLength", "length at least"),
        ("maxLength", "length at most"),
    ):
        if limit in rules:
            text += f", {words} {int(rules[limit]) if rules[limit] == int(rules[limit]) else rules[limit]}"
    return text


def main() -> None:
    """Write the document."""
    app = create_app(serving_config.load(CONFIG))
    DOCUMENT.write_text(document(app.openapi()), encoding="utf-8")


if __name__ == "__main__":
    main()
