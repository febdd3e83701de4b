"""A Flask application that calls a service: one client for all requests, and the caller's deadline on every call.

It is asked a few times, in this process, while an endpoint of the service is killed. The upstreams are started here so
that the example runs anywhere; yours are running somewhere already, and gunicorn serves the application.
"""

from flask import Flask

from meshlib import Mesh, Service, report
from meshlib.ext.flask import FlaskMesh
from meshlib.testing import upstreams


def create_app(mesh: FlaskMesh) -> Flask:
    app = Flask(__name__)
    app.config["MESHLIB_STATUS_PATH"] = "/mesh"
    mesh.init_app(app)

    @app.get("/orders/<int:number>")
    def order(number: int) -> str:
        return str(report(mesh.client("orders").get(f"/v1/orders/{number}").raise_for_status()))

    return app


with upstreams(3) as (a, b, c):
    app = create_app(FlaskMesh(Mesh(Service("orders", [a.address, b.address, c.address]))))
    asking = app.test_client()
    for number in range(6):
        if number == 3:
            c.kill()
        answer = asking.get(f"/orders/{number}", headers={"x-meshlib-deadline-ms": "15000"})
        assert answer.status_code == 200
        print(answer.text)
    left = [int(request.values("x-meshlib-deadline-ms")[0]) for each in (a, b) for request in each.log()]
    print(f"the service was given {max(left):,d} of 15,000 ms at most")
    late = asking.get("/orders/7", headers={"x-meshlib-deadline-ms": "0"})
    print(late.status_code, late.get_json())
    print(app.test_cli_runner().invoke(args=["mesh", "status"], catch_exceptions=False).output)  # flask mesh status
