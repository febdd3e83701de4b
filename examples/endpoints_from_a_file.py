"""Endpoints from a file: the service moves to another server, and calls follow it."""

import tempfile
import time
from pathlib import Path

from meshlib import Mesh, Service
from meshlib.testing import upstreams

with upstreams(2) as (old, new), tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "endpoints.toml")
    file.write_text(f'endpoints = ["{old.address}"]\n')

    with Mesh(Service("orders", f"file:{file}")) as mesh, mesh.client("orders") as client:
        mesh.wait_ready(5)  # not needed: the first call would wait as well
        print("answered by", client.get("/").headers["x-upstream"])

        fresh = file.with_suffix(".new")
        fresh.write_text(f'endpoints = ["{new.address}"]\n')
        fresh.rename(file)
        while client.get("/").headers["x-upstream"] != "b":
            time.sleep(0.1)
        print("answered by b,", mesh.snapshot()["orders"].source.rpartition("/")[2], "has changed")
