"""The JSON Schemas in docs/schemas are those of the models."""

import schemas

from zoo import registry


def test_schemas_are_up_to_date() -> None:
    folder = schemas.FOLDER
    written = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.json")}
    assert written == schemas.texts(), "run `python tools/schemas.py`"


def test_every_architecture_has_the_schema_of_its_config() -> None:
    made = schemas.schemas()
    for entry in registry.architectures().values():
        schema = made[f"configs/{entry.module}"]
        assert list(schema["properties"]) == list(entry.config_class.model_fields)
        assert schema["additionalProperties"] is False


def test_constraints_of_a_field_are_in_the_schema() -> None:
    fields = schemas.schemas()["configs/llama"]["properties"]
    assert (fields["layers"]["exclusiveMinimum"], fields["layers"]["maximum"]) == (0, 512)
    assert "silu" in fields["act"]["enum"] and "lm" in fields["head"]["enum"]
    assert "default" not in fields["kv_heads"]  # derived
