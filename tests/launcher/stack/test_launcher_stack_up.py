"""`step128 up` from the checks to the last line: what compose is called with, images, the wait, and failures."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Bench = Any  # the classes of conftest.py; a test cannot import it
Container = Any
GRAFANA, BASE = "grafana/grafana:13.2.0", "vllm/vllm-openai-cpu:v0.32.0"
DIGEST = "sha256:" + "b" * 64


@pytest.fixture
def container(bench: Bench, up_and_well: Callable[[], list[Container]]) -> Callable[..., Container]:
    """Make a container of the fake engine."""
    return type(up_and_well()[0])


def test_the_folder_without_compose_files(bench: Bench, tmp_path: Any) -> None:
    result = bench.run("up", "--project-directory", str(tmp_path))
    assert result.code == 66 and f"There is no compose.yaml in {tmp_path}" in result.err
    assert "--project-directory DIR" in result.err
    result = bench.run("up", "--overlay", "cdi")
    assert result.code == 66 and "There is no compose.cdi.yaml" in result.err


def test_settings_that_are_missing(bench: Bench) -> None:
    bench.set(
        "config_error", 'time="now" level=warning msg="x"\nrequired variable MODEL is missing: set MODEL in .env\n'
    )
    result = bench.run("up")
    assert result.code == 78 and "does not take the settings" in result.err and "set MODEL in .env" in result.err
    (bench.folder / ".env").unlink()
    result = bench.run("up")
    assert result.code == 66 and "`cp .env.example .env`" in result.err


def test_up(bench: Bench, up_and_well: Callable[[], list[Container]]) -> None:
    bench.engine.found = up_and_well()
    result = bench.run("up", "--cpu", "--profile", "monitoring")
    assert result.code == 0, result.err
    files = "--file compose.yaml --file compose.cpu.yaml --profile monitoring"
    assert bench.calls()[-1] == f"compose {files} up --detach"
    assert "PASS docker: engine 26.1.5, compose 2.26.1-4" in result.err
    assert "127.0.0.1:18000 is serve's already" in result.err
    assert 'Bearer $(cat secrets/api_key)" http://127.0.0.1:18000/v1/models' in result.err
    assert "grafana: http://127.0.0.1:13000, password in secrets/grafana_password" in result.err
    assert not result.out and (bench.folder / "secrets/api_key").read_text().strip() not in result.err


def test_the_files_are_compose_s_choice_unless_an_overlay_is_named(bench: Bench) -> None:
    assert bench.run("up", "--check", "--project-name", "mine").code == 0
    assert bench.calls()[-1] == "compose --project-name mine config --format json"
    assert not [call for call in bench.calls() if " up " in call]


def test_the_wait_tells_how_far_it_is(bench: Bench, container: Callable[..., Container]) -> None:
    loading = ["[  0.1 s] starting vLLM", "INFO x", "[ 12.3 s] loading weights:  40%, 1.2 GB/s, 60 s left", "INFO y"]
    life = [("created", None), *[("running", "starting")] * 8, ("running", "healthy")]
    bench.engine.found = [
        container("serve", *life, logs=loading, launcher={"state": "starting"}),
        container("grafana", ("running", "healthy")),
    ]
    result = bench.run("up", "--cpu")
    assert result.code == 0, result.err
    line = "s] grafana: healthy; serve: starting, loading weights:  40%, 1.2 GB/s, 60 s left"
    assert len([each for each in result.err.splitlines() if each.endswith(line)]) == 1, "the same line once"


def test_on_a_terminal_the_line_moves(
    bench: Bench, container: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what is captured for a terminal then
    monkeypatch.setattr("step128_launcher.stack.waiting.POLL_SECONDS", 0.2)
    life = [*[("running", "starting")] * 6, ("running", "healthy")]
    logs = ["[ 12.3 s] loading [weights]:  40%"]
    bench.engine.found = [
        container("serve", *life, logs=logs, launcher={"state": "starting"}),
        container("grafana", ("running", "healthy")),
    ]
    result = bench.run("up", "--cpu")
    assert result.code == 0, result.err
    assert "serve: starting, loading [weights]:  40% … " in result.err and "s] grafana: healthy" not in result.err


def test_who_interrupts_the_wait_is_told_that_the_start_goes_on(
    bench: Bench, container: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("step128_launcher.stack.waiting.time.sleep", interrupt)
    bench.engine.found = [container("serve", ("running", "starting"))]
    result = bench.run("up", "--cpu")
    assert result.code == 130 and "The start goes on by itself" in result.err


def test_why_the_server_is_restarted_is_told(bench: Bench, container: Callable[..., Container]) -> None:
    launcher = {"state": "restarting", "reason": "out of memory: a leaner plan", "hint": ""}
    life = [*[("running", "starting")] * 6, ("running", "healthy")]
    bench.engine.found = [container("serve", *life, launcher=launcher), container("grafana", ("running", "healthy"))]
    assert "serve: restarting, out of memory: a leaner plan" in bench.run("up", "--cpu").err


@pytest.mark.parametrize("health", ["starting", "unhealthy"])
def test_a_server_that_gave_up_ends_with_its_reason_and_code(
    bench: Bench, container: Callable[..., Container], health: str
) -> None:
    launcher = {"state": "failed", "reason": "Needs 130 GiB.", "hint": "Choose less context.", "exit_code": 3}
    logs = [f"line {number}" for number in range(50)]
    bench.engine.found = [
        container("serve", ("running", "starting"), ("running", health), launcher=launcher, logs=logs),
        container("grafana", ("running", "healthy")),
    ]
    result = bench.run("up", "--cpu")
    assert result.code == 3
    assert "serve failed: Needs 130 GiB." in result.err and "Choose less context." in result.err
    assert "  line 30\n" in result.err and "  line 49\n" in result.err and "line 29\n" not in result.err


@pytest.mark.parametrize(
    ("life", "more", "said"),
    [
        ([("exited", None)], {"exit_code": 1}, "grafana is exited (exit code 1, 0 restarts)"),
        ([("running", "unhealthy")], {"says": "wget: refused"}, "grafana is unhealthy: wget: refused"),
    ],
)
def test_another_service_that_fails(
    bench: Bench, container: Callable[..., Container], life: Any, more: dict[str, Any], said: str
) -> None:
    bench.engine.found = [
        container("serve", ("running", "starting"), launcher={"state": "starting"}),
        container("grafana", *life, **more, logs=["permission denied"]),
    ]
    result = bench.run("up", "--cpu")
    assert result.code == 69 and said in result.err and "  permission denied\n" in result.err
    assert "`step128 logs grafana`" in result.err


def test_a_service_that_ends_again_and_again(bench: Bench, container: Callable[..., Container]) -> None:
    made = container("grafana", ("restarting", None))
    looks = iter(range(100))
    real = made.reload

    def reload() -> None:
        made.more["restarts"] = next(looks)
        real()

    made.reload = reload
    bench.engine.found = [container("serve", ("running", "starting")), made]
    result = bench.run("up", "--cpu")
    assert result.code == 69 and "grafana is restarting (exit code 0, " in result.err


def test_it_does_not_wait_for_ever(bench: Bench, container: Callable[..., Container]) -> None:
    bench.engine.found = [container("serve", ("running", "starting"))]
    result = bench.run("up", "--cpu", "--timeout", "1")
    assert result.code == 69 and "Not up after 1 s: grafana, serve" in result.err
    assert "grafana: not created yet" in result.err


def test_compose_that_fails(bench: Bench, container: Callable[..., Container]) -> None:
    bench.set("up_code", "17")
    result = bench.run("up", "--cpu")
    assert result.code == 69 and "`docker compose up` failed (exit status 17)" in result.err
    bench.engine.found = [container("serve", ("running", "unhealthy"), says="no key")]
    assert "serve is unhealthy: no key" in bench.run("up", "--cpu").err


def test_a_server_that_was_given_up_is_started_anew(bench: Bench, container: Callable[..., Container]) -> None:
    life = [*[("running", "unhealthy")] * 3, ("running", "healthy")]
    bench.engine.found = [container("serve", *life), container("grafana", ("running", "healthy"))]
    result = bench.run("up", "--cpu")
    assert result.code == 0, result.err
    assert "Unhealthy, so started anew: serve." in result.err
    assert [call.split(" compose.cpu.yaml ")[1] for call in bench.calls()[-2:]] == ["stop serve", "up --detach"]


def test_images_that_are_to_be_had(bench: Bench, api_error: Callable[[int, str], Exception]) -> None:
    bench.engine.local = {}
    bench.engine.remote = {GRAFANA: DIGEST, BASE: DIGEST}
    result = bench.run("up", "--cpu", "--check")
    assert result.code == 0
    assert (
        f"{GRAFANA} is to be pulled" in result.err
        and f"{BASE} is to be pulled, and step128:cpu built on it" in result.err
    )
    bench.engine.local = {BASE: []}
    assert f"step128:cpu is to be built on {BASE}, which is here" in bench.run("up", "--cpu", "--check").err


@pytest.mark.parametrize(
    ("status", "text", "code", "said"),
    [
        (404, "manifest unknown", 66, "no registry gives it out"),
        (403, "pull access denied for x", 66, "no registry gives it out"),
        (500, "dial tcp: lookup registry.example: no such host", 69, "its registry cannot be asked"),
    ],
)
def test_images_that_are_not(
    bench: Bench, api_error: Callable[[int, str], Exception], status: int, text: str, code: int, said: str
) -> None:
    del bench.engine.local[GRAFANA]
    bench.engine.remote = {GRAFANA: api_error(status, text)}
    result = bench.run("up", "--cpu")
    assert result.code == code
    assert f"{GRAFANA}, for grafana, is not here, and {said}: " in result.err and text in result.err
    assert ("docker login" if code == 66 else "docker load") in result.err


def test_lock(bench: Bench, up_and_well: Callable[[], list[Container]]) -> None:
    bench.engine.found = up_and_well()
    bench.engine.remote = {BASE: DIGEST}
    result = bench.run("up", "--cpu", "--lock")
    assert result.code == 0, result.err
    text = (bench.folder / "images.lock.env").read_text()
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    here = "grafana/grafana@sha256:" + "a" * 64
    assert settings == [f"GRAFANA_IMAGE={here}", f"CPU_BASE_IMAGE=vllm/vllm-openai-cpu@{DIGEST}"]
    assert "# step128:cpu: built here (sha256:1111" in text and "UNVERIFIED" not in text
    named = "compose --env-file .env --env-file images.lock.env --file compose.yaml"
    assert bench.calls()[-1].startswith(named) and bench.calls()[-1].endswith("up --detach")
    bench.run("up", "--cpu", "--check")
    assert bench.calls()[-1].startswith(named), "from then on it is used"
    bench.run("up", "--cpu", "--lock", "--check")
    assert not [call for call in bench.calls()[-2:] if "images.lock.env" in call], "and to lock anew the tags are"


def test_lock_without_a_network_says_what_is_unverified(bench: Bench) -> None:
    result = bench.run("up", "--cpu", "--lock", "--check")
    assert result.code == 0
    assert f"Unverified: {BASE}." in result.err
    text = (bench.folder / "images.lock.env").read_text()
    assert f"# {BASE}: UNVERIFIED, by its tag still: dial tcp: lookup registry.example: no such host\n" in text
    assert "CPU_BASE_IMAGE" not in text
    bench.engine.local[GRAFANA] = []
    (bench.folder / "images.lock.env").unlink()
    result = bench.run("up", "--cpu", "--lock")
    assert result.code == 69 and "was not written and nothing was started" in result.err
    assert not (bench.folder / "images.lock.env").exists()


@pytest.mark.parametrize(
    ("image", "digests", "pinned"),
    [
        ("localhost:5000/a/b", ["localhost:5000/a/b@" + DIGEST], "localhost:5000/a/b@" + DIGEST),
        ("docker.io/library/x:1", ["x@" + DIGEST], "docker.io/library/x@" + DIGEST),
        ("x:1", ["mirror/x@" + DIGEST], None),
        ("x@" + DIGEST, [], "x@" + DIGEST),
    ],
)
def test_pins_are_of_the_image_s_own_repository(
    bench: Bench, document: dict[str, Any], image: str, digests: list[str], pinned: str | None
) -> None:
    document["services"]["grafana"]["image"] = image
    bench.set("config.json", json.dumps(document))
    bench.engine.local[image] = digests
    bench.engine.remote = {BASE: DIGEST}
    bench.run("up", "--cpu", "--lock", "--check")
    lines = (bench.folder / "images.lock.env").read_text().splitlines()
    assert (f"GRAFANA_IMAGE={pinned}" in lines) == (pinned is not None)
    assert bool([line for line in lines if line.startswith("GRAFANA_IMAGE=")]) == (pinned is not None)
