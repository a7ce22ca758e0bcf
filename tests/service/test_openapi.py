"""docs/openapi.json is what the service serves; a change of the API shows in its diff."""

import json

from ngd_service.api.application import api_application
from tests.support import ROOT

FILE = ROOT / "docs" / "openapi.json"


def test_written_description_is_the_one_served() -> None:
    written = json.loads(FILE.read_text())
    written["info"].pop("version")
    served = json.loads(json.dumps(api_application().openapi()))
    served["info"].pop("version")

    assert written == served, "run: python -m ngd_service.api.application > docs/openapi.json"


def test_every_operation_documents_its_problem() -> None:
    for path, operations in api_application().openapi()["paths"].items():
        for method, operation in operations.items():
            answer = operation["responses"]["default"]["content"]
            assert answer == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}, path
            assert "422" not in operation["responses"], (method, path)


def test_job_spec_is_described_for_json_and_yaml() -> None:
    schema = api_application().openapi()

    content = schema["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]

    assert set(content) == {"application/json", "application/yaml"}
    assert "damping" in schema["components"]["schemas"]["NGDOptimizer"]["properties"]
