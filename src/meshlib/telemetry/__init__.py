"""What a mesh tells OpenTelemetry: metrics and traces, by its API alone; `setup` is for who has no SDK set up.

    telemetry.setup("checkout", prometheus_port=9464)

A mesh records as soon as a real provider is there, be it the process's or one it was given. Until then nothing is
recorded, and OpenTelemetry is not even loaded.
"""

from meshlib.telemetry.sdk import Running, setup

__all__ = ["Running", "setup"]
