"""What plugs a mesh into the programs of others: the status page as an ASGI and as a WSGI app.

Nothing in meshlib imports these modules; an application imports the one that it needs.
"""
