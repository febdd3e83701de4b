"""A mesh from a file: it follows the file, refuses it while it is broken, and loses no call meanwhile."""

import shutil
import tempfile
import time
from pathlib import Path

from meshlib import Mesh
from meshlib.testing import upstreams

with upstreams(2) as (old, new), tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "mesh.toml")
    shutil.copy(Path(__file__).with_name("mesh.toml"), file)
    endpoints = Path(folder, "orders.toml")
    endpoints.write_text(f'endpoints = ["{old.address}"]\n')

    with Mesh.from_toml(file, reload=True) as mesh, mesh.client("orders") as client:
        print("answered by", client.get("/").headers["x-upstream"])

        good = file.read_text()
        file.write_text(good.replace("total = 5.0", "total = 0"))
        while not (warnings := mesh.snapshot()["orders"].warnings):
            client.get("/").raise_for_status()
            time.sleep(0.05)
        print("refused:", warnings[0].partition(": ")[2])

        file.write_text(good.replace('"file:orders.toml"', f'["{new.address}"]'))
        while client.get("/").headers["x-upstream"] != "b":
            time.sleep(0.05)
        print("answered by b, by", mesh.snapshot()["orders"].source)
