"""The custom resource definitions inside the chart."""

from __future__ import annotations

import pytest
import yaml
from helm.rendering import CHART, ROOT, Chart

FILES = sorted((ROOT / "operator" / "api" / "crds").glob("*.yaml"))
COPY = "the copy is old: python -m calotype.operator.api.crdgen --output helm/crd-files"


def test_the_chart_has_the_definitions_of_the_operator() -> None:
    assert len(FILES) == 5
    names = [file.name for file in FILES]
    assert sorted(file.name for file in (CHART / "crd-files").glob("*")) == names, COPY
    for file in FILES:
        assert (CHART / "crd-files" / file.name).read_bytes() == file.read_bytes(), COPY


@pytest.mark.parametrize("keep", [True, False])
def test_they_are_rendered_word_for_word(chart: Chart, keep: bool) -> None:
    rendered = chart.render(values={"crds": {"keep": keep}})
    found = {item["metadata"]["name"]: item for item in rendered.kind("CustomResourceDefinition")}
    assert len(found) == len(FILES)
    for file in FILES:
        definition = yaml.safe_load(file.read_text(encoding="utf-8"))
        mine = found[definition["metadata"]["name"]]
        annotations = mine["metadata"].pop("annotations", {})
        kept = annotations.pop("helm.sh/resource-policy", None)
        assert kept == ("keep" if keep else None)
        assert annotations == definition["metadata"].pop("annotations", {})
        assert mine == definition


def test_a_second_release_leaves_them_to_the_first(chart: Chart) -> None:
    rendered = chart.render(values={"crds": {"install": False}})
    assert rendered.kind("CustomResourceDefinition") == []
