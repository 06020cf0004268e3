"""The page at /docs: the OpenAPI description as plain HTML, without scripts and without outside addresses."""

from html import escape
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
:root { color-scheme: light dark }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .3rem .6rem }
tr + tr { border-top: 1px solid #8884 } code { font: 14px ui-monospace, monospace }
"""


def page(openapi: dict[str, Any]) -> str:
    """Return the page of an OpenAPI description."""
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    sections = [
        _operation(method, path, operation, openapi)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        f'<p>For programs: <a href="openapi.json">openapi.json</a></p>{"".join(sections)}</html>'
    )


def _operation(method: str, path: str, operation: dict[str, Any], openapi: dict[str, Any]) -> str:
    text = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if not content:
        return text
    schema = _resolve(content["schema"], openapi)
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(_type(field))}</code></td>"
        f"<td>{'required' if name in schema.get('required', ()) else ''}</td>"
        f"<td>{escape(_resolve(field, openapi).get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"{text}<table><tr><th>field<th>type<th><th></tr>{''.join(rows)}</table>"


def _resolve(schema: dict[str, Any], openapi: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return openapi["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type(each) for each in schema["anyOf"] if each.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(repr, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"[{_type(schema.get('items', {}))}]"
    return schema.get("type", "any")
