"""`step128 profiles`, and which profile a plan takes: the list, STEP128_PROFILE, broken files of the user's."""

import json
from pathlib import Path

import pytest

from step128_launcher import cli
from step128_launcher.errors import ExitCode, LauncherError
from step128_launcher.planning.profiles import (
    load_profiles,
)

MACHINES = Path(__file__).parents[1] / "machines"
REAL_MODEL = Path(__file__).parents[1] / "data" / "step-3.7-flash-240"


@pytest.fixture(autouse=True)
def no_user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP128_PROFILES_DIR", str(tmp_path / "own"))
    monkeypatch.delenv("STEP128_PROFILE", raising=False)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["--machine", str(MACHINES / "quad-r9700")]
    assert cli.main(["profiles", *machine]) == 0
    here, _, elsewhere = capsys.readouterr().out.partition("- Not for this machine:")
    assert "  * quad-r9700 " in here and "    single-r9700 " in here and "cpu" not in here
    assert "the machine has a GPU" in elsewhere and "needs 1 x gfx1151; found 4 x" in elsewhere
    assert cli.main(["profiles", *machine, str(REAL_MODEL), "--policy", "all-linears", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    entries = {entry["name"]: entry for entry in document["profiles"]}
    assert document["schema"] == 2 and {"cpu", "quad-r9600", "dgx-spark"} < set(entries)
    quad, single, strix = (entries[name] for name in ("quad-r9700", "single-r9700", "strix-halo-128"))
    assert quad["chosen"] and quad["runs"] and "context 204800, MTP 3, KV fp8" in quad["detail"]
    assert single["fits_machine"] and single["runs"] is False and "missing" in single["detail"]
    assert not strix["fits_machine"] and strix["runs"] is None and quad["max_num_seqs"] == 16


def test_which_profile_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The machine's own by default, STEP128_PROFILE over it, --profile over both."""
    plan = ["plan", str(REAL_MODEL), "--policy", "all-linears", "--machine", str(MACHINES / "quad-r9700"), "--json"]

    def used(*arguments: str) -> str:
        assert cli.main([*plan, *arguments]) == 0
        return str(json.loads(capsys.readouterr().out)["profile"])

    assert used() == "quad-r9700"
    monkeypatch.setenv("STEP128_PROFILE", "quad-r9600")
    assert used() == "quad-r9600"
    assert used("--profile", "quad-r9700") == "quad-r9700" == used("--profile", "auto", "--objective", "context")


@pytest.fixture
def broken_files(configs_dir: Path, tmp_path: Path) -> Path:
    """The user's folder with two broken files, one of a shipped name, and a whole one."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "bad.yaml").write_text("a: [")
    (own / "quad-r9600.yaml").write_text("description: half")
    (own / "mine.yaml").write_text((configs_dir / "profiles" / "cpu.yaml").read_text())
    return own


def test_the_list_with_broken_files_and_a_profile_asked_for(
    broken_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = ["profiles", "--machine", str(MACHINES / "quad-r9700")]

    def listed(asked: str) -> tuple[str, list[str]]:
        monkeypatch.setenv("STEP128_PROFILE", asked)
        assert cli.main(machine) == 0
        text = capsys.readouterr().out
        assert cli.main([*machine, "--json"]) == 0
        entries = json.loads(capsys.readouterr().out)["profiles"]
        chosen = [f"{entry['name']}{' broken' if entry['broken'] else ''}" for entry in entries if entry["chosen"]]
        return text, chosen

    text, chosen = listed("auto")
    whole, _, broken = text.partition("- Broken:")
    assert "  * quad-r9700 " in whole and "    quad-r9600 " in whole and "    mine " in whole
    assert f"broken: Profile {broken_files}/bad.yaml cannot be read" in broken and "the key device is missing" in broken
    assert len(broken.strip().splitlines()) == 4 and chosen == ["quad-r9700"]
    assert listed("single-r9700")[1] == ["single-r9700"] and "  * single-r9700 " in listed("single-r9700")[0]
    assert listed("quad-r9600")[1] == ["quad-r9600 broken"] and listed("bad")[1] == ["bad broken"]
    assert listed("nowhere")[1] == ["nowhere broken"]


def test_a_broken_file_of_the_user_s_is_skipped_with_a_warning(
    broken_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", str(REAL_MODEL), "--policy", "all-linears", "--machine", str(MACHINES / "quad-r9700")]
    assert cli.main([*plan, "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert [text for text in warnings if "broken" in text and str(broken_files / "bad.yaml") in text]
    assert cli.main([*plan, "--profile", "bad"]) == ExitCode.BAD_CONFIGURATION
    assert cli.main([*plan, "--profile", "quad-r9600"]) == ExitCode.BAD_CONFIGURATION


def test_a_broken_shipped_file_is_an_error(configs_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "cpu.yaml").write_text((configs_dir / "profiles" / "cpu.yaml").read_text())
    assert set(load_profiles(tmp_path)[0]) == {"cpu"}
    (folder / "bad.yaml").write_text("a: [")
    with pytest.raises(LauncherError, match=r"bad\.yaml") as caught:
        load_profiles(tmp_path)
    assert caught.value.exit_code == ExitCode.BAD_CONFIGURATION
