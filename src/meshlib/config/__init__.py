"""Configuration: services from a mapping, a TOML file or the environment.

    Mesh.from_toml("mesh.toml", reload=True)

`tables` says which settings there are, as the dataclasses of the settings say it; `reading` makes services of tables;
`sources` finds the tables, in files and in the environment; `schema` tells editors; `reload` follows a file that
changes. Nothing of this is loaded by `import meshlib`.
"""
