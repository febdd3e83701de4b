"""Decisions, and nothing else: what an outcome means, which node is next, when a breaker opens, whether to try again.

No I/O, no clock, no thread, no randomness of its own: `now` and `rng` come in as arguments, so that every decision
can be replayed in a test.
"""
