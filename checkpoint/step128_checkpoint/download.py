"""``download REPO OUT``: fetches a checkpoint from the hub, verified. Loads huggingface_hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from step128_checkpoint.byte_progress import byte_progress
from step128_checkpoint.commands.options import usable_cores
from step128_checkpoint.files import size_text
from step128_checkpoint.hub import fetch
from step128_checkpoint.hub.listing import list_files


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the command `download`; sets `run` as its function."""
    parser = commands.add_parser(
        "download",
        description="Fetch a model repository. The free disk is compared with what is still missing before anything is "
        "fetched. The same command continues an interrupted run file by file: finished files are kept, one that was "
        "under way is fetched from its start. At the end every file's hash is compared with the hub's. HF_TOKEN and "
        "`hf auth login` are used for gated and private models, HF_ENDPOINT names another hub.",
        epilog="Exit codes: 0 all there and verified, 5 gated, private or not writable, 65 a file differs from the "
        "hub's, 66 no such repository or revision, 69 the hub cannot be reached, 73 OUT cannot be used or the disk is "
        "too small, 78 a setting is wrong or huggingface_hub is missing.",
    )
    parser.add_argument("repo", metavar="REPO", help="owner/name")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make, or one that an earlier run made")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: the default branch)")
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="PATTERN", help="only these files, such as '*.json'"
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="not these files")
    parser.add_argument("--dry-run", action="store_true", help="list the files and sizes, fetch nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Download and verify; returns the exit code."""
    out: Path = arguments.output
    listing = list_files(arguments.repo, arguments.revision, arguments.include, arguments.exclude)
    missing = fetch.missing_files(listing, out)
    missing_bytes = sum(file.size_bytes for file in missing)
    report = {
        "repo": listing.repo,
        "commit": listing.commit,
        "output": str(out),
        "files": len(listing.files),
        "size_bytes": listing.size_bytes,
        "missing_files": len(missing),
        "missing_bytes": missing_bytes,
        "verified": False,
    }
    console = Console(stderr=arguments.json, soft_wrap=True)
    console.print(
        f"{escape(listing.repo)} at {listing.commit[:12]}: {len(listing.files)} files, "
        f"{size_text(listing.size_bytes)}; {len(missing)} of them, {size_text(missing_bytes)}, are still to be fetched"
    )
    fetch.check_place(listing, out)
    if arguments.dry_run:
        for file in missing:
            console.print(f"  {escape(file.name)}  {size_text(file.size_bytes)}")
        console.print("Nothing was fetched.")
    else:
        with byte_progress("fetching", listing.size_bytes) as on_progress:
            fetch.fetch(listing, out, on_progress)
        with byte_progress("verifying", listing.size_bytes) as on_progress:
            fetch.verify_files(listing, out, usable_cores(), on_progress)
        fetch.note_download(listing, out)
        report |= {"missing_files": 0, "missing_bytes": 0, "fetched_bytes": missing_bytes, "verified": True}
        console.print(f"{escape(str(out))}: all {len(listing.files)} files verified against the hub's hashes")
    if arguments.json:
        print(json.dumps(report))
    return 0
