"""What one or many workers would tell Prometheus in half an hour, as cases for `promtool test rules`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

Series = list[dict[str, str]]

MINUTES = 60
AFTER = "30m"


class Workers:
    """So many processes of one job, which are scraped each minute and all call one service."""

    def __init__(self, count: int) -> None:
        self.count = count

    def series(self, metric: str, values: str, *, only: int | None = None, after: int = 0, **labels: str) -> Series:
        """What a metric is, in the notation of promtool: of all workers, of the first ones, or of those after them."""
        chosen = range(after, self.count if only is None else only)
        told = "".join(f', {name}="{value}"' for name, value in labels.items())
        return [
            {
                "series": f'{metric}{{job="checkout", instance="w{number}", server_address="orders"{told}}}',
                "values": values,
            }
            for number in chosen
        ]

    def gauge(self, metric: str, value: float, **more: Any) -> Series:
        """It is the same all the time."""
        return self.series(metric, f"{value}x{MINUTES}", **more)

    def calls(self, each_minute: int, **more: Any) -> Series:
        """So many attempts."""
        return self.series("http_client_request_duration_seconds_count", f"0+{each_minute}x{MINUTES}", **more)

    def ended(self, each_minute: int, **more: Any) -> Series:
        """So many calls that ended in a certain way."""
        return self.series("meshlib_client_call_duration_seconds_count", f"0+{each_minute}x{MINUTES}", **more)

    def case(self, name: str, *told: Series, alerts: Collection[str] = ()) -> dict[str, Any]:
        """A case in which just these alerts fire in the end."""
        return {
            "name": f"{name} ({self.count})",
            "interval": "1m",
            "input_series": [each for series in told for each in series],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname, server_address) (ALERTS{alertstate="firing"})',
                    "eval_time": AFTER,
                    "exp_samples": [
                        {"labels": f'{{alertname="{alert}", server_address="orders"}}', "value": 1} for alert in alerts
                    ],
                }
            ],
        }
