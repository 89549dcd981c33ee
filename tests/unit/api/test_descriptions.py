"""Descriptions of the HTTP API: every field of every request and response, and every parameter of every route."""

from __future__ import annotations

import inspect
from unittest.mock import MagicMock

import pytest
from pydantic import BaseModel

from htcl_ray.api import requests, responses
from htcl_ray.config.sections import ServeSettings
from htcl_ray.schemas import METADATA_COLUMNS, RESULT_COLUMNS
from htcl_ray.serving.api_keys import Keys
from htcl_ray.serving.http_app import create_app

pytestmark = pytest.mark.unit

MODELS = sorted(
    {
        model
        for module in (requests, responses)
        for _, model in inspect.getmembers(module, inspect.isclass)
        if issubclass(model, BaseModel) and model is not BaseModel
    },
    key=lambda model: model.__name__,
)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_has_a_description(model: type[BaseModel]):
    properties = model.model_json_schema().get("properties", {})
    assert not [name for name, schema in properties.items() if not described(schema)]


def test_every_openapi_parameter_and_body_field_has_a_description():
    document = create_app(MagicMock(), ServeSettings(), Keys(())).openapi()
    missing = [
        f"{method.upper()} {path}: {parameter['name']}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for parameter in operation.get("parameters", ())
        if not described(parameter) and not described(parameter.get("schema", {}))
    ]
    missing += [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        if hasattr(requests, name) or hasattr(responses, name)
        for field, value in schema.get("properties", {}).items()
        if not described(value)
    ]
    assert not missing


def described(schema: dict) -> bool:
    """A description of the field itself, or of one of its alternatives, such as `K | null`."""
    text = schema.get("description") or next(
        (part["description"] for part in schema.get("anyOf", ()) if part.get("description")), ""
    )
    return len(text) >= 5


def test_metadata_columns_reach_every_model():
    names = {column.name for column in METADATA_COLUMNS}
    assert set(requests.SongMetadata.model_fields) == names
    assert set(responses.Song.model_fields) == {"song_id", "estimated", *names}
    assert set(RESULT_COLUMNS) < set(responses.Result.model_fields)
    filterable = {column.name for column in METADATA_COLUMNS if column.traits.filterable}
    assert set(requests.Filter.model_fields) == {"song_id", "include_estimated", *filterable}


def test_responses_ignore_fields_of_a_newer_server():
    ready = responses.Ready.model_validate({"index": "v1", "songs": 3, "added_later": True})
    assert ready == responses.Ready(index="v1", songs=3)
