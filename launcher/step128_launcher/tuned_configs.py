"""Folders of tuned configurations (`configs/tuned/README.md`): the user's own comes before ours."""

import os
from collections.abc import Mapping
from pathlib import Path

TUNED_DIR_VARIABLE = "STEP128_TUNED_DIR"
"""Names the user's own folder; our kernels read the variable by themselves, in the server."""

VLLM_FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
"""Names the one folder in which vLLM's kernels look for files before those that vLLM ships."""


def own_folder(environment: Mapping[str, str]) -> Path | None:
    """Return the user's own folder, whether it exists or not; None: none is named."""
    value = environment.get(TUNED_DIR_VARIABLE)
    return Path(os.path.expanduser(value)) if value else None  # noqa: PTH111  never raises


def shipped_folder(configs_dir: Path) -> Path:
    """Return our folder, whether it exists or not."""
    return configs_dir / "tuned"


def vllm_folder(environment: Mapping[str, str], configs_dir: Path) -> Path:
    """Return the folder that vLLM is to look in: `vllm` in the user's own, if it is there; else in ours, there or not.

    The user's VLLM_TUNED_CONFIG_FOLDER, which goes before both, is not looked at.
    """
    own = own_folder(environment)
    if own is not None and (own / "vllm").is_dir():
        return own / "vllm"
    return shipped_folder(configs_dir) / "vllm"
