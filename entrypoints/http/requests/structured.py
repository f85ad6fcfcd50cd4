"""Turns the fields of a body that restrict the answer's form into sampling parameters."""

from typing import Any

from loraplex.entrypoints.http.errors import HttpError


def structured_outputs(
    response_format: dict[str, Any] | None, settings: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Returns the map of StructuredOutputsParams, None if the answer is free.

    Args:
        response_format: OpenAI's field, of the type text, json_object or json_schema.
        settings: vLLM's field `structured_outputs`, the map itself.

    Raises:
        HttpError: both are given, or `response_format` has another form.
    """
    kind = None if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return settings
    if settings is not None:
        raise HttpError(
            400, "give response_format or structured_outputs, not both", param="response_format"
        )
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise HttpError(
            400,
            f"response_format: type must be text, json_object or json_schema, got {kind!r:.40}",
            param="response_format",
        )
    named = response_format.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise HttpError(
            400, "response_format: json_schema must hold the schema", param="response_format"
        )
    return {"json": schema}
