"""The options of every verb: name, type, default, help and range, each declared once.

A verb's Python function and its command are both built from the same dataclass:

- `EvaluateOptions` holds what both take,
- `EvaluateArguments` adds what only the Python function takes (model, images, …),
- `EvaluateFlags` adds what only the command line takes (model strings, files to write, …).

To add an option, add one field here and read it where it is used. Nothing in this package imports torch, so that
`--help` returns quickly.
"""
