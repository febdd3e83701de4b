"""Resolvers: which endpoints a service has.

A resolver answers with a whole set of endpoints, off the request path. It never judges whether one of them is well.
"""
