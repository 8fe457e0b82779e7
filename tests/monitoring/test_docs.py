"""docs/: every link leads somewhere, every command, option, setting and file that is named exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OURS = ("step128", "step128-checkpoint", "step128-eval", "step128-kernels")
# Programs of the system or of Docker, and Docker's commands that we name.
SYSTEM = {
    *(
        "apt",
        "cat",
        "cp",
        "curl",
        "dmesg",
        "docker",
        "echo",
        "getent",
        "git",
        "grep",
        "ls",
        "lsmod",
        "nginx",
        "caddy",
        "ps",
    ),
    *("pip", "pipx", "python", "python3", "reboot", "sort", "head", "ssh", "sudo", "tar", "uname", "update-grub"),
    *("update-initramfs", "usermod", "amd-ttm", "vllm", "rocm-smi", "dracut"),
}
DOCKER = {"compose", "image", "run", "stats", "version"}
COMPOSE = {
    *("build", "config", "create", "down", "exec", "logs", "ps", "restart", "start", "stop", "up", "version"),
}
# Settings that are not compose.yaml's: of Docker's own, of vLLM's and the collectives' environment.
OTHER_SETTINGS = {
    "GRUB_CMDLINE_LINUX",
    "VLLM_HOST_IP",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "USER",
    "HOME",
    "PWD",
}


def fenced(text: str) -> list[str]:
    """The fenced blocks without a language: what is typed into a shell."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for kind, block in blocks if not kind]


def command_lines(text: str) -> list[str]:
    """Shell lines of fenced blocks without a language, and code in a line that begins with one of our programs."""
    lines = [line for block in fenced(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines() if line.strip()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return lines + [span for span in spans if re.match(r"(step128(-\w+)?|docker|make|sudo) \S", span)]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a pipeline, without sudo, settings before it, and a virtual environment's path."""
    found = []
    for part in re.split(r"\s(?:\||&&)\s", line):
        words = [word for word in shlex.split(part, comments=True) if word not in ("...", "…")]
        while words and (words[0] == "sudo" or re.fullmatch(r"[A-Z_0-9]+=.*", words[0])):
            words.pop(0)
        if words:
            found.append([words[0].rpartition("/")[2], *words[1:]])
    return found


@cache
def help_of(program: str, command: str) -> str | None:
    """The help of a command of ours; none where there is no such command."""
    path = Path(sys.executable).parent / program
    words = [str(path), command, "--help"] if command else [str(path), "--help"]
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    return result.stdout if result.returncode == 0 else None


def fault(words: list[str]) -> str | None:
    """What is wrong with a command, if anything."""
    program, rest = words[0], words[1:]
    if program in OURS:
        command = rest[0] if rest and not rest[0].startswith("-") else ""
        text = help_of(program, command)
        if text is None:
            return f"{program} has no command {command}"
        options = [word.partition("=")[0] for word in rest if word.startswith("-")]
        here = [word for word in rest if re.match(r"(tests|configs)/", word)]
        if absent := [word for word in here if not (ROOT / word).exists()]:
            return f"{absent} are not there"
        missing = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)]
        return f"{program} {command} has no {', '.join(missing)}" if missing else None
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if rest[0] in targets else f"make has no target {rest[0]}"
    if program == "docker":
        if rest[0] == "compose" and rest[1] == "exec" and rest[3] in OURS:
            return fault(rest[3:])
        known = rest[0] in DOCKER and (rest[0] != "compose" or rest[1] in COMPOSE)
        return None if known else f"docker {' '.join(rest[:2])} is none of those we know"
    if program in ("python", "python3") and rest and not rest[0].startswith("-"):
        return None if (ROOT / rest[0]).exists() else f"{rest[0]} is not there"
    return None if program in SYSTEM else f"{program} is neither ours nor a system's program that we know"


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    found = [words for line in command_lines(page.read_text()) for words in simple_commands(line)]
    wrong = [words_fault for words in found if (words_fault := fault(words))]
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    spans = re.findall(r"`([^`\n]+)`", text)
    example = (ROOT / ".env.example").read_text()
    for span in spans:
        if re.fullmatch(r"(configs|docs|launcher|scripts|tests|docker|checkpoint)/[\w./-]+", span):
            assert (ROOT / span).exists(), span
        if re.fullmatch(r"(compose[\w.]*\.yaml|LOG\.md|README\.md|\.env\.example)", span):
            assert (ROOT / span).exists(), span
    launcher = "".join(path.read_text() for path in (ROOT / "launcher/step128_launcher").rglob("*.py"))
    for name in re.findall(r"\b([A-Z][A-Z0-9]*_[A-Z0-9_]+)\b", " ".join(spans)):
        assert name in OTHER_SETTINGS or name in example or name in launcher, name


def test_all_pages_are_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert all(f"({page.name}" in index for page in PAGES if page.name != "README.md")


def test_the_tests_can_fail() -> None:
    assert fault(["step128", "fly"]) == "step128 has no command fly"
    assert fault(["step128", "plan", "--machines", "x"]) == "step128 plan has no --machines"
    assert fault(["docker", "compose", "exec", "serve", "step128", "statu"])
    assert fault(["step128", "plan", "tests/machines/none"])
    assert fault(["docker", "compose", "upp"]) and fault(["make", "tea"]) and fault(["rm", "-rf"])
    assert anchors("## 3. Docker\n## 2. Kernel, driver, groups\n") == {"3-docker", "2-kernel-driver-groups"}


@pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM in this environment to look its arguments up in")
def test_vllm_has_the_arguments_of_several_boxes() -> None:
    spec = find_spec("vllm")
    folder = Path(str(spec.origin)).parent if spec else Path()
    arguments = (folder / "engine/arg_utils.py").read_text() + (
        folder / "entrypoints/launchers/cli_args.py"
    ).read_text()
    text = (ROOT / "docs/multi-box.md").read_text()
    table = re.findall(r"^\| `(--[\w-]+)(?: mp)?`(?:, `(-\w)`)? \| (\S+)", text, re.MULTILINE)
    assert len(table) == 6
    for name, short, default in table:
        assert re.search(rf'"{name}"' + (rf', "{short}"' if short else ""), arguments), name
        if re.fullmatch(r"[\d.]+", default):
            field = name[2:].replace("-", "_")
            config = (folder / "config/parallel.py").read_text()
            assert re.search(rf'{field}: \w+ = (Field\(default=)?"?{re.escape(default)}"?[,\n]', config), name
    for name in re.findall(r"(?<=\s)(--[a-z-]+)", " ".join(line for line in fenced(text) if "vllm serve" in line)):
        assert f'"{name}"' in arguments, name
