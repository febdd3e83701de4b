from meshlib.telemetry.sdk import Running, setup

__all__ = ["Running", "setup"]
