"""What the metrics count, and that dashboards and alerts name metrics that there are."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from molmo_server.engine_pool.fake import DEFAULT_ANSWER, Trick
from molmo_server.telemetry.engine_metrics import ENGINE_METRICS, merged
from tests.server.media import image_part, picture, text_part
from tests.support.gateway import RunningGateway, running_gateway, until

ROOT = Path(__file__).parents[2]
ENGINE_TEXT = """# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="molmo2"} 2.0
# HELP vllm:e2e_seconds Latency.
# TYPE vllm:e2e_seconds histogram
vllm:e2e_seconds_bucket{engine="0",le="+Inf"} 3.0
vllm:e2e_seconds_count{engine="0"} 3.0
vllm:e2e_seconds_sum{engine="0"} 1.5
# HELP process_open_fds Of the process.
# TYPE process_open_fds gauge
process_open_fds 7.0
vllm:bare 1.0
"""


@pytest.fixture
def fresh(folder: Path, tmp_path: Path) -> Iterator[RunningGateway]:
    with running_gateway(folder, tmp_path) as gateway:
        yield gateway


def samples(gateway: RunningGateway) -> Callable[..., float]:
    """One look at the metrics: the value of a sample by name and labels, 0 where there is none."""
    values = {}
    for family in text_string_to_metric_families(gateway.http.get("/metrics").text):
        for one in family.samples:
            values[one.name, frozenset(one.labels.items())] = one.value

    def value(name: str, **labels: str) -> float:
        return values.get((name, frozenset(labels.items())), 0.0)

    return value


def test_a_stream_is_measured(fresh: RunningGateway) -> None:
    checkpoint = fresh.http.get("/health").json()["checkpoint"]
    content = [image_part(picture()), text_part("x")]
    fresh.stream_bytes(content)
    fresh.chat(content)

    value = samples(fresh)
    of = {"checkpoint": checkpoint}
    assert value("molmo_time_to_first_token_seconds_count", **of) == 1
    assert value("molmo_inter_token_seconds_count", **of) == 1
    assert value("molmo_completion_tokens_total", **of) == 2 * -(-len(DEFAULT_ANSWER) // 4)
    n_prompt, n_visual = (value(f"molmo_{k}_tokens_total", **of) for k in ("prompt", "visual"))
    assert n_prompt == 2  # as the engine tells: it counts words
    assert n_visual > 0
    for step in ("queue", "media", "routing", "prompt"):
        assert value("molmo_step_seconds_count", step=step) == 2
    assert value("molmo_media_looks_total") == 1
    assert value("molmo_media_cache_hits_total") == 1


def test_the_time_between_tokens_is_that_of_the_stream(fresh: RunningGateway) -> None:
    fresh.engine.seconds_per_piece = 0.02
    fresh.stream_bytes("Hi")
    checkpoint = fresh.http.get("/health").json()["checkpoint"]
    mean_s = samples(fresh)("molmo_inter_token_seconds_sum", checkpoint=checkpoint)
    assert 0.02 <= mean_s < 0.06


def test_errors_are_counted_by_code(fresh: RunningGateway) -> None:
    fresh.chat("Hi", temperatur=1)
    fresh.http.get("/nothing")
    fresh.http.get("/admin/usage?days=1")
    fresh.chat(str(Trick.FAIL))
    fresh.stream_bytes(str(Trick.BREAK))
    with fresh.http.stream(
        "POST",
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": str(Trick.SLOW)}], "stream": True},
    ) as left:
        next(left.iter_bytes())
    until(lambda: samples(fresh)("molmo_errors_total", code="caller_left") == 1)

    value = samples(fresh)
    counted = {
        code: value("molmo_errors_total", code=code)
        for code in ("unknown_parameter", "not_found", "invalid_api_key", "engine_failed")
    }
    assert counted == {
        "unknown_parameter": 1,
        "not_found": 1,
        "invalid_api_key": 1,
        "engine_failed": 1,
    }
    assert value("molmo_errors_total", code="engine_unavailable") == 1


def test_uploads_and_engines_are_counted(fresh: RunningGateway) -> None:
    data = picture()
    kept = fresh.http.post("/v1/media", content=data, headers={"content-type": "image/png"})
    assert kept.status_code == 200
    value = samples(fresh)
    assert value("molmo_uploads_total") == 1
    assert value("molmo_upload_bytes_total") == value("molmo_media_bytes") == len(data)
    states = {
        state: value("molmo_engine_state", engine="engine-0", state=state)
        for state in ("ready", "starting", "failed")
    }
    assert states == {"ready": 1, "starting": 0, "failed": 0}
    assert value("molmo_engine_in_flight", engine="engine-0") == 0


def test_metrics_of_several_engines_are_told_apart() -> None:
    text = merged({"engine-0": ENGINE_TEXT, "engine-1": ENGINE_TEXT, "engine-2": ""})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() == {"vllm:num_requests_running", "vllm:e2e_seconds", "vllm:bare"}
    running = families["vllm:num_requests_running"]
    assert (running.type, running.documentation) == ("gauge", "Number of requests.")
    assert [one.labels for one in running.samples] == [
        {"gateway_engine": name, "engine": "0", "model_name": "molmo2"}
        for name in ("engine-0", "engine-1")
    ]
    assert len(families["vllm:e2e_seconds"].samples) == 6
    assert text.count("# TYPE") == 2


def expressions() -> Iterator[tuple[str, str]]:
    """(where, what is asked) of the dashboard and the alerts."""
    dashboard = json.loads((ROOT / "deploy/grafana/molmo.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    yield "variable", dashboard["templating"]["list"][1]["query"]["query"]
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    for rule in alerts["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


def test_dashboard_and_alerts_name_what_there_is(gateway: RunningGateway) -> None:
    families = text_string_to_metric_families(gateway.http.get("/metrics").text)
    known = set(ENGINE_METRICS)
    for family in families:
        known |= {family.name}
    suffixes = ("_total", "_bucket", "_sum", "_count")
    named = set()
    for where, expression in expressions():
        found = re.findall(r"\b(?:molmo_|vllm:)\w+", expression)
        assert found, where
        for name in found:
            bare = next((name.removesuffix(s) for s in suffixes if name.endswith(s)), name)
            assert name in known or bare in known, f"{where}: {name}"
            named |= {name, bare}
    assert set(ENGINE_METRICS) <= named


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    dashboard: dict[str, Any] = json.loads((ROOT / "deploy/grafana/molmo.json").read_text())
    panels = dashboard["panels"]
    assert dashboard["schemaVersion"] >= 39  # Grafana 10.3
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]


def test_the_installed_engine_has_the_metrics_that_are_named() -> None:
    found = importlib.util.find_spec("vllm")  # read, not imported: that takes seconds
    assert found is not None
    assert found.origin is not None
    sources = [
        path.read_text()
        for part in ("v1/metrics", "v1/spec_decode")
        for path in (Path(found.origin).parent / part).glob("*.py")
    ]
    registered = set(re.findall(r'"(vllm:\w+)"', "".join(sources)))
    assert set(ENGINE_METRICS) - registered == set()
