"""The request path: two short drivers, sync and async, over the decisions of `meshlib.core`.

Everything that waits or writes is here, and nothing that decides. `binding` is the one place that knows httpx.
"""
