"""The part of JSON Schema that clusters.json uses, strictly: a field that no schema names is a fault."""

import re
from collections.abc import Iterator
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int, "number": (int, float)}


def faults(value: Any, schema: dict, where: str = "") -> Iterator[str]:
    """What is wrong, as "spec.rules.0: no field 'nmae'"."""
    if schema.get("x-kubernetes-int-or-string"):
        schema = {"type": ["integer", "string"]}
    for key in ("anyOf", "oneOf"):
        if key in schema:
            tried = [list(faults(value, one, where)) for one in schema[key]]
            if all(tried):
                yield from min(tried, key=len)
            if not schema.get("type"):
                return
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds):
        yield f"{where}: {value!r} is no {' or '.join(kinds)}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        yield f"{where}: {value!r} is not like {schema['pattern']}"
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where}: {value} is out of range"
    if isinstance(value, dict):
        yield from _fields(value, schema, where)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: {len(value)} items"
        for i, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), f"{where}.{i}")


def _fields(value: dict, schema: dict, where: str) -> Iterator[str]:
    known, alike = schema.get("properties", {}), schema.get("patternProperties", {})
    more = schema.get("additionalProperties", "properties" not in schema)
    yield from (f"{where}: there is no {name!r}" for name in schema.get("required", ()) if name not in value)
    for name, item in value.items():
        like = next((of for pattern, of in alike.items() if re.search(pattern, name)), more)
        if name in known or like:
            yield from faults(item, known.get(name, like if isinstance(like, dict) else {}), f"{where}.{name}".lstrip("."))
        else:
            yield f"{where}: no field {name!r}"
