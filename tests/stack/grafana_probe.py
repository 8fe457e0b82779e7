"""Stands in Grafana's place in the container proof: loads what is provisioned and runs every panel's query.

It runs in a container with the mounts, user and secret of compose.yaml's `grafana`, on its port: /api/health answers
like Grafana's, and /report runs all queries against the data source and returns what each found. It renders nothing.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

PROVISIONING = Path(os.environ.get("GF_PATHS_PROVISIONING", "/etc/grafana/provisioning"))
PORT = 3000
# What Grafana puts in place of its own variables; short windows, as the stack has not been up for long.
BUILT_IN = {
    "__rate_interval": "1m",
    "__interval": "15s",
    "__interval_ms": "15000",
    "__range": "5m",
    "__range_s": "300",
    "__range_ms": "300000",
}
_VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)|\[\[(\w+)\]\]")


def data_sources() -> dict[str, dict[str, Any]]:
    """Return uid and name -> data source, those of every provisioned file."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((PROVISIONING / "datasources").glob("*.y*ml")):
        for source in yaml.safe_load(path.read_text())["datasources"]:
            found[source.get("uid", source["name"])] = found[source["name"]] = source
            if source.get("isDefault"):
                found[""] = source
    return found


def dashboards() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file name and dashboard of every provider's folder."""
    for path in sorted((PROVISIONING / "dashboards").glob("*.y*ml")):
        for provider in yaml.safe_load(path.read_text())["providers"]:
            for file in sorted(Path(provider["options"]["path"]).rglob("*.json")):
                yield file.name, json.loads(file.read_text())


def panels(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every panel with queries, those of collapsed rows included."""
    for item in items:
        if item.get("targets"):
            yield item
        yield from panels(item.get("panels", []))


def ask(url: str, path: str, parameters: list[tuple[str, str]]) -> Any:
    """Return `data` of an answer of Prometheus's API."""
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=20) as answer:
        return json.load(answer)["data"]


def values(url: str, variable: dict[str, Any], known: dict[str, str]) -> list[str]:
    """Return what a variable can stand for."""
    if variable["type"] == "datasource":
        return ["prometheus"]
    if variable["type"] in ("custom", "interval", "constant", "textbox"):
        text = variable.get("query", "")
        return [part.strip() for part in str(text).split(",") if part.strip()]
    query = variable["query"]
    query = query.get("query", "") if isinstance(query, dict) else query
    match = re.fullmatch(r"label_values\((?:(.+),\s*)?(\w+)\)", query.strip(), re.S)
    if match is None:
        raise ValueError(f"variable {variable['name']}: {query!r} is not understood")
    selector = [("match[]", replaced(match[1], known))] if match[1] else []
    return [str(value) for value in ask(url, f"label/{match[2]}/values", selector)]


def replaced(text: str, known: dict[str, str]) -> str:
    """Return the text with its variables filled in; an unknown one is an error."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2] or match[3]
        if name not in known:
            raise ValueError(f"variable ${name} is not defined")
        return known[name]

    return _VARIABLE.sub(value, text)


def report() -> dict[str, Any]:
    """Run every query of every panel, and the annotations'; nothing that fails is left out."""
    sources = data_sources()
    result: dict[str, Any] = {"datasources": sorted(sources), "dashboards": {}, "queries": []}
    for file, dashboard in dashboards():
        known = dict(BUILT_IN)
        result["dashboards"][file] = dashboard["title"]
        url = sources[""]["url"].rstrip("/") if "" in sources else next(iter(sources.values()))["url"].rstrip("/")
        for variable in dashboard.get("templating", {}).get("list", []):
            try:
                found = values(url, variable, known)
            except (OSError, ValueError, KeyError) as error:
                result["queries"].append(entry(file, "variable", variable["name"], error=str(error)))
                found = []
            many = variable.get("multi") or variable.get("includeAll")
            if variable["type"] not in ("datasource", "interval", "constant", "textbox", "custom"):
                result["queries"].append(entry(file, "variable", variable["name"], series=len(found)))
            escaped = [re.escape(each).replace("\\", "\\\\") for each in found]
            known[variable["name"]] = f"({'|'.join(escaped)})" if many else (found or [""])[0]
        for panel in panels(dashboard["panels"]):
            for target in panel["targets"]:
                if "expr" not in target:
                    continue
                try:
                    expression = replaced(target["expr"], known)
                    series = ask(url, "query", [("query", expression)])["result"]
                    result["queries"].append(entry(file, panel["title"], target["expr"], series=len(series)))
                except (OSError, ValueError, KeyError) as error:
                    detail = error.read().decode() if hasattr(error, "read") else str(error)
                    result["queries"].append(entry(file, panel["title"], target["expr"], error=detail))
    return result


def entry(file: str, panel: str, expression: str, series: int = 0, error: str = "") -> dict[str, Any]:
    """Return what one query found."""
    return {"dashboard": file, "panel": panel, "expr": expression, "series": series, "error": error}


class Handler(BaseHTTPRequestHandler):
    """Answers /api/health and /report."""

    def do_GET(self) -> None:
        """Answer one request."""
        if self.path == "/api/health":
            body: Any = {"database": "ok", "password_bytes": len(password()), "user": os.getuid()}
        elif self.path == "/report":
            body = report()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


def password() -> str:
    """Return the administrator's password, from where Grafana would read it."""
    return Path(os.environ["GF_SECURITY_ADMIN_PASSWORD__FILE"]).read_text().strip()


if __name__ == "__main__":
    password()  # a secret that is not there or cannot be read ends the start, as Grafana's does
    (Path("/var/lib/grafana") / "probe").write_text("written\n")
    ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()
