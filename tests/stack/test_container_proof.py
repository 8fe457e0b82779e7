"""The container stack for real: built, brought up, asked, stopped, taken down, and what a user may get wrong.

Where no Docker engine can be had the whole module is skipped, with the reason. Grafana cannot be had here: a probe with
its mounts stands in its place (grafana_probe.py), so that every query is run and nothing is rendered.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

import pytest
from container_stack import IMAGE, PROJECT, Stack, Timed, fetch, use_machine, wait_until
from prometheus_drill import in_fast_motion, write

pytestmark = pytest.mark.proof
SERVICES = {"serve": "10001:0", "prometheus": "65534:65534", "grafana": "472:0"}
QUESTION = {"model": "tiny-nl4", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 24}


@pytest.fixture(scope="module")
def stack(built: Stack, times: Timed) -> Stack:
    """The whole stack, healthy; `built` takes down what the last test here leaves."""
    with times("up --wait"):
        up = built.compose("up", "--detach", "--wait", check=False)
    assert up.returncode == 0, up.stderr + built.compose("logs", "--tail", "60").stdout
    return built


def test_it_answers_through_the_published_port(stack: Stack) -> None:
    answer = fetch(f"{stack.api}/v1/chat/completions", QUESTION, stack.key)
    assert answer.status == 200, answer.text
    assert json.loads(answer.text)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "no_key", "wrong", "metrics_token", "key"),
    [
        ("/health", 200, 200, 200, 200),
        ("/metrics", 401, 401, 200, 200),
        ("/v1/models", 401, 401, 401, 200),
        ("/docs", 404, 404, 404, 404),
        ("/invocations", 404, 404, 404, 404),
    ],
)
def test_the_key_and_the_token_open_what_they_should(
    stack: Stack, path: str, no_key: int, wrong: int, metrics_token: int, key: int
) -> None:
    keys = (None, "wrong", stack.metrics_token, stack.key)
    statuses = [fetch(stack.api + path, key=each).status for each in keys]
    assert statuses == [no_key, wrong, metrics_token, key]


@pytest.mark.parametrize("service", SERVICES)
def test_each_container_is_held_as_tightly_as_compose_says(stack: Stack, service: str) -> None:
    found = stack.inspect(service)
    host = found["HostConfig"]
    assert found["Config"]["User"] == SERVICES[service]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["IpcMode"] == "private" and not host["PidMode"] and host["Init"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped" and host["LogConfig"]["Config"]["max-size"] == "20m"
    addresses = {each["HostIp"] for bindings in host["PortBindings"].values() for each in bindings}
    assert addresses == {"127.0.0.1"}
    assert not [mount for mount in found["Mounts"] if "docker.sock" in mount["Source"]]
    status = stack.engine.docker("exec", f"{PROJECT}-{service}-1", "cat", "/proc/self/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["CapEff"].strip("0") == fields["CapBnd"].strip("0") == ""
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"


def test_what_is_written_goes_into_the_volumes_only(stack: Stack) -> None:
    tries = (
        "for at in / /models /opt/step128 /var/cache/step128 /var/lib/step128 /tmp; do touch $at/x && echo $at; done"
    )
    allowed = stack.compose("exec", "-T", "serve", "sh", "-c", f"{tries}; true").stdout.split()
    assert allowed == ["/var/cache/step128", "/var/lib/step128", "/tmp"]


def test_the_devices_are_there_and_open_to_the_groups(stack: Stack) -> None:
    tries = "for at in /dev/kfd /dev/dri/renderD*; do : <> $at && echo $at; done"
    opened = stack.compose("exec", "-T", "serve", "sh", "-c", tries).stdout.split()
    assert opened == ["/dev/kfd", *(f"/dev/dri/renderD{number}" for number in range(128, 132))]


def test_nothing_goes_out_of_the_published_network(stack: Stack) -> None:
    listed = stack.engine.docker("network", "inspect", f"{PROJECT}_frontend", f"{PROJECT}_backend").stdout
    frontend, backend = json.loads(listed)
    assert frontend["Options"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert backend["Internal"]


def test_prometheus_scrapes_the_server_the_launcher_and_itself(stack: Stack, times: Timed) -> None:
    jobs = {"vllm", "step128", "prometheus"}
    waited = wait_until(
        "every target up",
        lambda: {each["metric"]["job"] for each in stack.query("up == 1")} == jobs,
        60,
    )
    times.lines.append(f"all targets up {waited:.0f} s later")
    assert stack.query("vllm:generation_tokens_total")
    assert stack.query("step128_plan_max_model_len_tokens or step128_server_healthy == 1")


def test_the_gpus_of_both_boxes_are_seen(stack: Stack, times: Timed) -> None:
    """The same exporter, while the machine below it is exchanged for the other."""

    def gpus() -> int:
        return len(stack.query("count by (gpu) (step128_gpu_vram_used_bytes and on (gpu) step128_gpu_info)"))

    wait_until("four R9700", lambda: gpus() == 4, 60)
    use_machine(stack.machine, "strix-halo-128-gtt120")
    try:
        waited = wait_until("one Strix Halo", lambda: len(stack.query('step128_gpu_info{target="gfx1151"}')) == 1, 90)
    finally:
        use_machine(stack.machine, "quad-r9700")
    times.lines.append(f"other box seen {waited:.0f} s after the exchange")
    wait_until("four R9700 again", lambda: gpus() >= 4, 90)


def test_every_query_of_every_dashboard_has_data(stack: Stack) -> None:
    """Each on one of the two boxes at least, since some figures are only an APU's, and others only a card's."""
    without: dict[tuple[str, str, str], int] = {}
    for machine in ("quad-r9700", "strix-halo-128-gtt120"):
        use_machine(stack.machine, machine)
        for _ in range(3):
            fetch(f"{stack.api}/v1/chat/completions", QUESTION, stack.key)
            time.sleep(16)  # a scrape, so that rates have something to see
        report = json.loads(fetch(f"{stack.probe}/report").text)
        assert report["dashboards"] and report["datasources"]
        errors = [each for each in report["queries"] if each["error"]]
        assert not errors, json.dumps(errors, indent=1)
        for each in report["queries"]:
            asked = (each["dashboard"], each["panel"], each["expr"])
            without[asked] = without.get(asked, 0) + (each["series"] == 0)
        print(f"\n{machine}: {len(report['dashboards'])} dashboards, {len(report['queries'])} queries")
    use_machine(stack.machine, "quad-r9700")
    empty = [asked for asked, times in without.items() if times == 2]
    print(f"{len(without) - len(empty)} of {len(without)} queries have data")
    assert not empty, json.dumps(empty, indent=1)


@pytest.fixture(scope="module")
def fast(stack: Stack) -> Stack:
    """The rules with every duration shortened and a scrape a second; the expressions are otherwise as shipped."""
    folder = stack.folder / "prometheus"
    for path in (folder / "rules").glob("*.yml"):
        path.write_text(in_fast_motion(path.read_text()))
    config = re.sub(r"(_interval|_timeout): \d+s", r"\1: 1s", (folder / "prometheus.yml").read_text())
    (folder / "prometheus.yml").write_text(config)
    stack.compose("kill", "--signal", "HUP", "prometheus")
    return stack


def drill(stack: Stack, alert: str, times: Timed, limit_seconds: float = 90) -> Callable[[], None]:
    """Wait until an alert fires; return what waits until it does not."""
    fired = wait_until(f"{alert} fires", lambda: alert in stack.alerts(), limit_seconds)

    def resolved() -> None:
        passed = wait_until(f"{alert} resolves", lambda: alert not in stack.alerts(), limit_seconds)
        times.lines.append(f"{alert} fired after {fired:.0f} s, resolved after {passed:.0f} s")

    return resolved


def test_a_hot_gpu_is_an_alert(fast: Stack, times: Timed) -> None:
    sensor = next(fast.machine.glob("sys/devices/*/*/*/*/*/hwmon/hwmon*/temp2_input"))
    before = sensor.read_bytes()
    write(sensor, 108_000)
    resolved = drill(fast, "Step128GpuHot", times)
    write(sensor, before)
    resolved()


def test_a_token_that_is_not_the_servers_is_an_alert(fast: Stack, times: Timed) -> None:
    path = fast.folder / "secrets/metrics_token"
    before = path.read_text()
    path.write_text("another\n")  # the same file: a container keeps the one that it was started with
    resolved = drill(fast, "Step128VllmMetricsMissing", times)
    path.write_text(before)
    resolved()


def test_a_launcher_that_is_gone_and_a_wrong_model_are_alerts_and_no_crash_loop(fast: Stack, times: Timed) -> None:
    fast.compose("stop", "serve")
    back = drill(fast, "Step128LauncherDown", times)
    with times("up --wait with a wrong MODEL refused after"):
        up = fast.compose("up", "--detach", "--wait", "serve", check=False, MODEL="nowhere")
    assert up.returncode != 0 and "unhealthy" in up.stderr, up.stderr
    back()
    resolved = drill(fast, "Step128ServerHeld", times)
    status, said = fast.health("serve")
    assert status == "unhealthy" and "/models/nowhere" in said, said
    found = fast.inspect("serve")
    assert found["RestartCount"] == 0 and found["State"]["Running"]
    log = fast.compose("logs", "--no-log-prefix", "serve").stdout
    assert "/models/nowhere" in log and "Traceback" not in log, log
    with times("right MODEL again, up --wait"):
        fast.compose("up", "--detach", "--wait", "serve")
    resolved()


def test_the_kernels_gates_run_in_the_image(stack: Stack, times: Timed) -> None:
    """What a user does whose base image brings another Triton; here some of the kernels, by the image's own."""
    run = ("run", "--rm", "--no-deps", "--no-TTY")
    some = ("--kernel", "attention", "--kv-dtype", "fp8", "--q-len", "4", "--phase", "decode", "--arch", "gfx1201")
    with times("inspect of some kernels in the image"):
        found = stack.compose(*run, "--entrypoint", "step128-kernels", "serve", "inspect", *some, "--json").stdout
    assert json.loads(found)
    # It fails for the faked devices, which no driver knows; what it says of Triton is asked here.
    findings = json.loads(stack.compose(*run, "serve", "doctor", "--json", check=False).stdout)["findings"]
    (triton,) = [each for each in findings if each["check"] == "triton"]
    assert triton["outcome"] == "PASS", triton


def test_stop_and_start_keep_the_data(stack: Stack, times: Timed) -> None:
    before = stack.query("count(prometheus_build_info)")
    moment = time.time()
    with times("stop"):
        stack.compose("stop")
    assert stack.inspect("serve")["State"]["ExitCode"] == 0
    with times("start again, up --wait"):
        stack.compose("up", "--detach", "--wait")
    assert before
    assert stack.query(f"count(prometheus_build_info @ {moment:.0f})")
    plan = stack.compose("exec", "-T", "serve", "cat", "/var/lib/step128/8000/vllm.log.1").stdout
    assert plan, "the log of the start before is in the volume"


def test_down_leaves_nothing(stack: Stack, times: Timed) -> None:
    with times("down --volumes"):
        stack.compose("down", "--volumes")
    assert stack.leftovers() == {}
    assert stack.engine.docker("image", "inspect", IMAGE, check=False).returncode == 0, "images are the user's to keep"
