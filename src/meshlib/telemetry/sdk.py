"""OpenTelemetry's SDK in one line, for programs that have not set it up otherwise.

Decides which exporters there are and which boundaries histograms get. It is the one place that touches the SDK. It sets
the process's providers, so it is for the program to call, once, and never for a library.
"""

from __future__ import annotations


def setup() -> None: ...
