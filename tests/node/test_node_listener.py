"""The Node.js example, with real Node.js, a real server and a real worker."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from cachebus import open_sync_cache
from cachebus.testing.servers import Server

from ..javascript import packages, tool
from .conftest import LIMIT, ROOT, RunWorker

EXAMPLE = ROOT / "examples" / "node-listener"


def test_node_listens_reads_and_invalidates(
    run_worker: RunWorker, nats_server: Server, namespace: str, tmp_path: Path
) -> None:
    folder = packages(EXAMPLE / "package.json")
    # Node.js looks for packages in the folder of the program.
    shutil.copy(EXAMPLE / "listener.js", tmp_path)
    shutil.copy(EXAMPLE / "package.json", tmp_path)
    (tmp_path / "node_modules").symlink_to(folder / "node_modules", target_is_directory=True)
    run_worker("--backend", "primary=memory://")
    json_values = {"serializer": "json"}
    cache = open_sync_cache(
        "bus:primary", bus=nats_server.url, namespace=namespace, on_error="raise", payload=json_values
    )
    try:
        cache.set("user:1", {"name": "Ada ☕", "bytes": b"\x00\xff"}, tags=["users"])
        cache.set("user:2", "stays", tags=["others"])
        done = subprocess.run(
            [tool("node"), "listener.js", nats_server.url, namespace, "primary", "user:1", "users"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines[0] == {"what": "listening", "namespace": namespace, "backend": "primary"}
        replies = [each for each in lines if each["what"] == "reply"]
        assert replies == [
            {
                "what": "reply",
                "kind": "reply.found",
                "value": {"name": "Ada ☕", "bytes": {"$bytes": "AP8="}},
                "tags": ["users"],
            },
            {"what": "reply", "kind": "reply.invalidated"},
            {"what": "reply", "kind": "reply.missing"},
        ]
        (event,) = [each for each in lines if each.get("kind") == "event.tags_invalidated"]
        assert (event["tags"], event["missed"]) == (["users"], 0)
        (refused,) = [each for each in lines if each["what"] == "refused"]
        assert refused["why"].startswith("bad_message: ")
        assert cache.get("user:1") is None
        assert cache.get("user:2") == "stays"
    finally:
        cache.close()
